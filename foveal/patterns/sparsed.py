"""SparseD (arXiv 2509.24014): dense first steps, then one block mask per head, chosen once and kept for all later steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.base_mask import FULL
from ..core.context import SelectContext, State
from ..core.layouts import Layout, block_mask
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..kernels.pooling import full_precision
from .base import LookAhead, Pattern
from .sparsed_blocks import Sides, choose, side_importance
from .step_state import Remembered, check_state, step_of


@dataclass(frozen=True, eq=False)
class BlocksKept(Remembered):
    """What SparseD remembers; ``shape`` is ``(B, H, q_len, kv_len)``.

    Attributes:
        blocks: ``(B, H, q blocks, key blocks)`` bool, or None before the mask was made.
    """

    blocks: Tensor | None = None


@register("pattern", "sparsed")
@dataclass(frozen=True)
class SparseD(Pattern):
    """Each head keeps, for every query block, its most important key blocks of the prompt and, apart, of the answer.

    Attributes:
        keep: ρ, share of key blocks kept on each side: ``min(n, ⌊ρ·n⌋ + 1)`` of ``n`` blocks.
        skip: s; steps up to ``⌊s·steps⌋ + 1`` are dense, and the mask is made at the last of them.
        steps: T, denoising steps of the generation.
        generated: last tokens of each sequence, which are being generated. A block that holds prompt and answer counts as prompt.
        block: rows and keys per block.
        selection: "paper": the softmax of each side by itself ranks its blocks. "code": the prompt's blocks are those among
            the best of *all* blocks, so they may be fewer; the answer's are ranked by themselves.
        literal: rank as the authors' code for LLaDA: logits over the square root of the number of heads, and a last, partial
            block averaged as if it were whole.

    The importance of a block is the mean attention in it. Without ``ctx.step`` (no denoising) every call makes its own mask and
    there is no state. A state that was lost is made again at the next sparse step. Under a causal mask the diagonal blocks stay
    too, so that each row sees itself. Source: section 3 and the authors' code; defaults for long contexts (``block=32``,
    ``keep=0.5`` for short ones).
    """

    keep: float = 0.3
    skip: float = 0.2
    steps: int = 128
    generated: int = 128
    block: int = 128
    selection: Literal["paper", "code"] = "paper"
    literal: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("keep", "skip"):
            check_range(self, name, low=0.0, high=1.0)
        for name in ("steps", "block"):
            check_range(self, name, low=1)
        check_range(self, "generated", low=0)

    @property
    def look_ahead(self) -> LookAhead:
        return "prefill"

    @property
    def last_dense(self) -> int:
        """t*, the step that makes the mask; later ones are sparse."""
        return math.floor(self.skip * self.steps) + 1

    @property
    def dense_steps(self) -> int:
        """Dense steps of a generation."""
        return min(self.steps, self.last_dense + 1)

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """None up to ``last_dense``; later a ``BlockMask`` per head.

        Raises:
            ShapeError, ConfigError: a state of another shape, layer, configuration or later step.
        """
        if ctx.step is None:
            return self._layout(self.blocks(q, k, ctx), ctx), None
        step = step_of(ctx, "sparsed")
        shape = (*q.shape[:3], k.shape[2])
        last = check_state(state, BlocksKept, "sparsed", self, ctx, step, shape)
        blocks = None if last is None else last.blocks
        if blocks is None and step >= self.last_dense:
            blocks = self.blocks(q, k, ctx)
        state = BlocksKept(self, ctx.layer_index, step, shape, blocks, grid=ctx.grid)
        return (None if step <= self.last_dense else self._layout(blocks, ctx)), state

    @torch.no_grad()
    def blocks(self, q: Tensor, k: Tensor, ctx: SelectContext) -> Tensor:
        """``(B, H, q blocks, key blocks)`` bool: blocks kept for these queries and keys; O(N·block) memory at a time."""
        with full_precision(q):
            scale = 1.0 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale
            if self.literal:
                scale *= math.sqrt(q.shape[-1] / q.shape[1])
            sides = Sides.of(ctx.base, self.block, self.generated)
            found = side_importance(q, k, ctx.base, scale, sides, apart=self.selection == "paper", padded=self.literal)
            return choose(*found, ctx.base, sides, self.keep, self.selection)

    def _layout(self, blocks: Tensor | None, ctx: SelectContext) -> Layout:
        assert blocks is not None
        size = (self.block, self.block)
        return block_mask(blocks.to(torch.int8) * FULL, size, (ctx.base.q_len, ctx.base.kv_len))
