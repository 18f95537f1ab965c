"""Perplexity by position: does the model make use of what lies far back?"""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import register
from ..data.text import need, split
from .base import Material, Passage, Quiz, Task


def passages(material: Material) -> list[Passage | Quiz]:
    """Disjoint pieces of the text, as long as the context: ``trials`` of them, or as many as there are."""
    body = material.context - len(material.ahead)
    need(material.ids, body)
    count = min(material.trials, len(material.ids) // body)
    spans = split(material.ids, material.context, search=0, held_out=count, seed=material.seed, ahead=material.ahead)
    return [Passage(f"text.{i}", ids) for i, ids in enumerate(spans.held_out)]


@register("task", "perplexity")
@dataclass(frozen=True)
class Perplexity(Task):
    """Of every position of ordinary text."""

    title = "Perplexity by position"
    about = "Ordinary text as long as the context, every token predicted from all before it. Lower is better."
    measure = "nll"
    order = 0

    def items(self, material: Material) -> list[Passage | Quiz]:
        return passages(material)
