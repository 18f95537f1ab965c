"""KL divergence from the model's own dense attention, by position: the same passages as perplexity, read once for both."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.registry import register
from .base import Material, Passage, Quiz, Task
from .perplexity import passages


@register("task", "kl")
@dataclass(frozen=True)
class Divergence(Task):
    """KL(dense ‖ policy) of the next token's distribution."""

    title = "KL to dense by position"
    about = "How far a policy moves the distribution of the next token, KL(dense ‖ policy) in nats. 0 is dense."
    measure = "kl"
    needs_policy = True
    order = 1

    def items(self, material: Material) -> list[Passage | Quiz]:
        return passages(material)
