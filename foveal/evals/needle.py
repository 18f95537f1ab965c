"""Needle in a haystack over depth × length: is one odd sentence found, wherever it lies?

Each context holds one needle per depth, each of another kind, so that one reading serves all. The wrong answers are numbers that
stand nowhere in the context: a model that has seen the needle at all prefers the right one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import register
from ..data.needle import SUBJECTS
from .base import Material, Passage, Quiz, Task, at_lengths
from .haystack import Fact, Wanted, capital, codes, hide, sample

DEPTHS, OTHERS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), 3


@register("task", "needle")
@dataclass(frozen=True)
class Needle(Task):
    """Six needles a context, at six depths; the context and halves of it."""

    title = "Needle in a haystack"
    about = "An invented fact between the sentences of ordinary text, asked for at the end; the wrong answers stand nowhere in the context."
    axes = ("length", "depth")
    order = 2

    def items(self, material: Material) -> list[Passage | Quiz]:
        return at_lengths(material, _quiz)


def _quiz(material: Material, length: int, trial: int) -> Quiz:
    key = f"needle.{length}.{trial}"
    g = material.generator(key)
    kinds = [SUBJECTS[i] for i in sample(len(DEPTHS), len(SUBJECTS), g)]
    subjects = [f"{kind} {of[sample(1, len(of), g)[0]]}" for kind, of in kinds]
    numbers = codes(len(DEPTHS) * (1 + OTHERS), g)
    facts, wanted = [], []
    for i, (subject, depth) in enumerate(zip(subjects, DEPTHS, strict=True)):
        right, *wrong = numbers[i * (1 + OTHERS) : (i + 1) * (1 + OTHERS)]
        begun = f"{capital(subject)} is"
        facts.append(Fact(f"{begun} {right}.", depth))
        at = {"length": length, "depth": depth}
        wanted.append(Wanted(f"What is {subject}?", begun, right, tuple(wrong), at))
    return hide(material, key, length, facts, wanted, g)
