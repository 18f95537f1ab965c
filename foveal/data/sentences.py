"""Neighbouring sentences of a text as pairs that belong together: a retrieval task without labels."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from ..core.errors import DataError

SHORTEST, LONGEST = 5, 60
"""Words of a sentence."""
HELD_OUT = 0.25
"""Share of the text, its end, that only evaluation sees."""
FEWEST = 10
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'“(])")


@dataclass(frozen=True)
class Pairs:
    """Sentences to train on, and pairs of neighbours from another part of the text.

    Attributes:
        training: sentences in random order. first, second: ``first[i]`` is followed by ``second[i]`` in its paragraph; no sentence
            occurs twice.
    """

    training: tuple[str, ...]
    first: tuple[str, ...]
    second: tuple[str, ...]


def paragraphs(text: str) -> list[list[str]]:
    """Sentences of every paragraph, in order: prose alone, with white space made single."""
    found = []
    for block in re.split(r"\n\s*\n", text):
        sentences = [s for s in _END.split(" ".join(block.split())) if SHORTEST <= len(s.split()) <= LONGEST]
        prose = [s for s in sentences if sum(c.isalpha() or c.isspace() for c in s) >= 0.8 * len(s)]
        found.append(prose)
    return [p for p in found if p]


def sentence_pairs(text: str, *, training: int, pairs: int, seed: int) -> Pairs:
    """Cut a text into training sentences and held-out pairs of neighbours.

    Args:
        training, pairs: how many at most. seed: chooses them.

    Raises:
        DataError: the text has fewer than ten pairs or training sentences.
    """
    blocks = paragraphs(text)
    cut = len(blocks) - max(1, round(HELD_OUT * len(blocks)))
    known = list(dict.fromkeys(s for block in blocks[:cut] for s in block))
    seen = set(known)
    neighbours: list[tuple[str, str]] = []
    for block in blocks[cut:]:
        for a, b in zip(block[::2], block[1::2], strict=False):
            if a not in seen and b not in seen and a != b:
                neighbours.append((a, b))
                seen |= {a, b}
    if min(len(known), len(neighbours)) < FEWEST:
        raise DataError(
            f"the text has {len(known)} sentences to train on and {len(neighbours)} pairs of neighbouring sentences to evaluate; expected at "
            f"least {FEWEST} of each. Pass a longer --text of prose."
        )
    g = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(known), generator=g)[:training].tolist()
    chosen = [neighbours[i] for i in torch.randperm(len(neighbours), generator=g)[:pairs].tolist()]
    return Pairs(tuple(known[i] for i in order), tuple(a for a, _ in chosen), tuple(b for _, b in chosen))
