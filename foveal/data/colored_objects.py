"""Colored Objects: one solved and one open question about the colours of three things, built to a tokenizer.

Template and facts of arXiv 2310.08744: colours and things of the two parts are disjoint; the corruption swaps the thing that is asked
for, so that exactly one word differs and another listed colour is right. Chance among the listed colours is 1/3.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from ..core.errors import ConfigError
from .pairs import Pair, PromptPairs, align, find, single_tokens
from .text import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "pink", "white", "gray")
THINGS = (
    "pen", "pencil", "cup", "book", "ball", "key", "ring", "plate", "sheet", "clock", "knife", "phone", "bag", "box", "coin", "hat",
    "bottle", "notebook",
)  # fmt: skip
WHERE, SEEN = ("table", "desk", "floor"), ("there is", "you see", "I see")


def build(tokenizer: PreTrainedTokenizerBase, count: int, *, seed: int = 0) -> PromptPairs:
    """Draw pairs.

    Places: ``colors`` (the three of the open question), ``right``, ``wrong`` (two), ``things`` (three), ``asked`` (the thing in the
    question), ``named`` (the same thing in the list), ``end``.

    Raises:
        ConfigError: no pairs. DataError: a tokenizer without enough single-token colours and things.
    """
    if count < 1:
        raise ConfigError(f"count is {count}; expected at least 1.")
    both = set(single_tokens(tokenizer, [c.capitalize() for c in COLORS], 6, "capitalised colours"))
    colors = [c for c in single_tokens(tokenizer, COLORS, 6, "colours") if c.capitalize() in both]
    things = single_tokens(tokenizer, THINGS, 6, "things")
    draw = random.Random(seed)
    pairs = [_pair(tokenizer, draw, colors, things, i) for i in range(count)]
    return align(tokenizer, "colored_objects", pairs, {"count": count, "seed": seed, "bos": False})


def _question(draw: random.Random, colors: list[str], things: list[str]) -> str:
    listed = [f"{'an' if c[0] in 'aeiou' else 'a'} {c} {t}" for c, t in zip(colors, things, strict=True)]
    opening = f"Q: On the {draw.choice(WHERE)}, {draw.choice(SEEN)}"
    return f"{opening} {listed[0]}, {listed[1]}, and {listed[2]}. What color is the"


def _pair(
    tokenizer: PreTrainedTokenizerBase, draw: random.Random, colors: list[str], things: list[str], i: int
) -> Pair:
    c, t = draw.sample(colors, 6), draw.sample(things, 6)
    solved = draw.randrange(3)
    first = f"{_question(draw, c[:3], t[:3])} {t[solved]}?\nA: {c[solved].capitalize()}\n"
    opened = _question(draw, c[3:], t[3:])
    asked = i % 3
    other = draw.choice([j for j in range(3) if j != asked])
    clean, corrupt = (f"{first}{opened} {t[3 + j]}?\nA:" for j in (asked, other))
    start = len(tokens(tokenizer, first))
    ids = tokens(tokenizer, clean)

    def where(word: str) -> list[int]:
        token = int(tokens(tokenizer, f" {word}")[0])
        return [start + at for at in find(ids[start:], token, repr(word))]

    at = [where(color)[0] for color in c[3:]]
    named = where(t[3 + asked])
    order = [asked, *(j for j in range(3) if j != asked)]
    places = {
        "colors": at, "right": [at[asked]], "wrong": [at[j] for j in order[1:]], "things": [where(thing)[0] for thing in t[3:]],
        "asked": named[-1:], "named": named[:1],
    }  # fmt: skip
    answers = [f" {c[3 + j].capitalize()}" for j in order]
    return Pair(clean, corrupt, answers[0], f" {c[3 + other].capitalize()}", places, answers)
