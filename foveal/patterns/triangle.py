"""Triangle (TriangleMix's shape): window and sinks everywhere, but the last rows of the prompt see everything."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.context import SelectContext, State
from ..core.layouts import Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from .base import LookAhead, Pattern
from .static import check_block, window_layout


@register("pattern", "triangle")
@dataclass(frozen=True)
class Triangle(Pattern):
    """Window and sinks in prefill, with the last rows dense; decoding is dense.

    Attributes:
        window: tokens visible, counting the query itself.
        sinks: first tokens of the sequence, always visible.
        dense_rows: last rows of a prefill call that see everything (the question at the prompt's end).
        block: the window counts whole blocks of this many positions, the query's own last; a divisor of ``window``.

    Which rows are last is known only at the end of a prefill call: feeding a prompt in chunks makes the last rows of
    *every* chunk dense, which keeps more, never less. ``look_ahead`` is therefore ``"prefill"``.
    """

    window: int
    sinks: int = 64
    dense_rows: int = 128
    block: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "window", low=1)
        check_range(self, "sinks", low=0)
        check_range(self, "dense_rows", low=0)
        check_block(self, self.window, self.block)

    @property
    def static(self) -> bool:
        return True

    @property
    def look_ahead(self) -> LookAhead:
        return "prefill" if self.dense_rows else "none"

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask`` for prefill; dense for calls of at most ``dense_rows`` rows, so for decoding."""
        base = ctx.base
        if base.q_len <= max(self.dense_rows, 1) or (base.causal and self.window - self.block + 1 >= base.kv_len):
            return None, state
        return window_layout(base, self.window, self.sinks, self.dense_rows, whole=self.block), state
