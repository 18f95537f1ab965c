"""Every allowed pair."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.context import SelectContext, State
from ..core.layouts import Layout
from ..core.registry import register
from .base import Pattern


@register("pattern", "dense")
@dataclass(frozen=True)
class Dense(Pattern):
    """Attend to everything that the model's own mask allows; the baseline of every comparison."""

    @property
    def static(self) -> bool:
        return True

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """Dense layout: None."""
        return None, state
