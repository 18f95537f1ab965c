"""Variable tracking in RULER's manner (arXiv 2404.06654, section 3): chains of assignments spread over the context.

``VAR A = 12345``, later ``VAR B = VAR A``, and so on; several chains run interleaved. RULER asks for the names of all variables that
hold a value; here each variable's value is asked for, so that the score is known for every number of hops. The wrong answers are the
values of the other chains.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.registry import register
from .base import Material, Passage, Quiz, Task, at_lengths
from .haystack import Fact, Wanted, codes, hide, sample

CHAINS, HOPS, ASKED = 4, 4, 2
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


@register("task", "tracking")
@dataclass(frozen=True)
class Tracking(Task):
    """Four chains of four hops; the variables of two of them are asked for."""

    title = "Variable tracking"
    about = "Chains of assignments over the whole context, as in RULER; a variable's value is asked for, 0 to 4 assignments away from its number."
    axes = ("hops", "length")
    order = 4

    def items(self, material: Material) -> list[Passage | Quiz]:
        return at_lengths(material, _quiz, halvings=1)


def _quiz(material: Material, length: int, trial: int) -> Quiz:
    key = f"tracking.{length}.{trial}"
    g = material.generator(key)
    names = _names(CHAINS * (HOPS + 1), g)
    numbers = codes(CHAINS, g)
    facts, wanted = [], []
    for chain in range(CHAINS):
        own = names[chain * (HOPS + 1) : (chain + 1) * (HOPS + 1)]
        places = torch.rand(HOPS + 1, generator=g).sort().values.tolist()
        values = [numbers[chain], *(f"VAR {name}" for name in own)]
        facts += [
            Fact(f"VAR {name} = {value}.", place)
            for name, value, place in zip(own, values[: HOPS + 1], places, strict=True)
        ]
        if chain < ASKED:
            wrong = tuple(n for i, n in enumerate(numbers) if i != chain)
            wanted += [
                Wanted(f"What is the value of VAR {name}?", f"The value of VAR {name} is", numbers[chain], wrong, {"hops": hop, "length": length})
                for hop, name in enumerate(own)
            ]  # fmt: skip
    return hide(material, key, length, facts, wanted, g)


def _names(count: int, generator: torch.Generator) -> list[str]:
    size = len(LETTERS)
    picked = sample(count, size**3, generator)
    return [LETTERS[i // size**2] + LETTERS[i // size % size] + LETTERS[i % size] for i in picked]
