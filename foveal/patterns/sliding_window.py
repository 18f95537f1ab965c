"""Sliding window with attention sinks (StreamingLLM's shape): near tokens plus the first few."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.context import SelectContext, State
from ..core.layouts import Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from .base import Pattern
from .static import check_block, window_layout


@register("pattern", "sliding_window")
@dataclass(frozen=True)
class SlidingWindow(Pattern):
    """Each query sees its last ``window`` tokens and the first ``sinks`` tokens of its sequence.

    Attributes:
        window: tokens visible, counting the query itself; on bidirectional models it opens to both sides.
        sinks: first tokens of the sequence (after left padding, inside the document), always visible.
        block: the window counts whole blocks of this many positions, of which the query's own is the last (and on bidirectional
            models the first of as many to the right): block-granular streaming. A divisor of ``window``; 1 counts tokens.
    """

    window: int
    sinks: int = 0
    block: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "window", low=1)
        check_range(self, "sinks", low=0)
        check_block(self, self.window, self.block)

    @property
    def static(self) -> bool:
        return True

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask`` in O(N) for prefill, a list of ``window + sinks`` keys for one new token."""
        if ctx.base.causal and self.window - self.block + 1 >= ctx.base.kv_len:
            return None, state
        return window_layout(ctx.base, self.window, self.sinks, whole=self.block), state
