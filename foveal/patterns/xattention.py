"""XAttention (arXiv 2503.16428, one of Flux's sparse options): blocks scored by sums along their antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import EMPTY, BaseMask
from ..core.budget import Budget
from ..core.context import SelectContext, State
from ..core.errors import ConfigError
from ..core.layouts import Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..kernels.call import compute_dtype
from ..kernels.pooling import diagonal_tiles, fill, filled_keys, full_precision, real_rows, sink_tiles
from .base import LookAhead, Pattern
from .documents import tile_layout

DEFAULT_BUDGET = Budget(mass=0.9)
SCORES = 1 << 22
"""Scores of stride against stride that are held at a time."""


@register("pattern", "xattention")
@dataclass(frozen=True)
class XAttention(Pattern):
    """Every block of queries keeps the fewest key blocks that hold a share of the mass estimated along antidiagonals.

    ``stride`` consecutive keys are joined to one long vector, and ``stride`` consecutive queries in reverse order: their product
    sums the logits of one antidiagonal of a ``stride × stride`` square. A softmax over all squares that a row of squares may see,
    summed over each block, estimates the block's mass.

    Attributes:
        budget: ``mass``, the share of a query block's mass to keep.
        stride: tokens joined; the estimate costs ``1 / stride`` of the products of dense attention. A divisor of ``block``.
        block: rows and keys per tile.

    On causal models the first block of a sequence and the diagonal are always kept, as in the authors' code; their rule keeps one
    more block than needed where the two coincide, which foveal does not. The last rows of a query block score for all of it:
    ``look_ahead`` is ``"block"``. Decoding is dense, as in the authors' code. There is no state.
    """

    budget: Budget = DEFAULT_BUDGET
    stride: int = 16
    block: int = 128

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "stride", low=1)
        check_range(self, "block", low=1)
        if self.budget.mass is None:
            raise ConfigError(
                f"XAttention.budget is {self.budget}; expected a mass. For tokens or a density use block_topk."
            )
        if self.block % self.stride:
            raise ConfigError(
                f"XAttention.stride is {self.stride} and block {self.block}; expected a stride that divides the block."
            )

    @property
    def look_ahead(self) -> LookAhead:
        return "block"

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask``; None for one new token, and for a mass of 1."""
        base = ctx.base
        if self.budget.mass == 1.0 or base.q_len <= 1 or base.kv_len <= 1:
            return None, state
        scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        with full_precision(q), torch.no_grad():
            return tile_layout(
                q, k, base, (self.block, self.block), lambda *part: self._tiles(*part, scale=scale)
            ), state

    def _tiles(self, q: Tensor, k: Tensor, base: BaseMask, *, scale: float) -> Tensor:
        """``(B, H, nqb, nkb)`` bool: tiles kept of one unpacked sequence."""
        mass = self._mass(q, k, base, scale)
        reach = (base.block_map(self.block, self.block) > EMPTY)[:, None]
        forced = torch.zeros_like(reach)
        if base.causal:
            band = diagonal_tiles(base, self.block, self.block)
            forced = reach & (band | sink_tiles(base, self.block, 1)[:, None, None])
        room = (self.budget.mass or 0.0) - (mass * forced).sum(-1)
        scored = mass.sum(-1, keepdim=True) > 0
        return fill(mass, reach & ~forced & scored, mass, room, 1.0) | forced

    def _mass(self, q: Tensor, k: Tensor, base: BaseMask, scale: float) -> Tensor:
        """``(B, H, nqb, nkb)`` float64: estimated share of each query block's attention on each key block."""
        batch, heads, per_kv = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
        written = torch.arange(base.kv_len, device=k.device)[None] < filled_keys(base)
        rows = _joined(q, real_rows(base), self.stride, self.block, reverse=True)
        keys = _joined(k, written if base.valid is None else written & base.valid, self.stride, self.block)
        squares = base.block_map(self.stride, self.stride) > EMPTY
        squares = pad(squares, (0, keys.shape[2] - squares.shape[2], 0, rows.shape[2] - squares.shape[1]))
        each = self.block // self.stride
        out = rows.new_empty(batch, heads, rows.shape[2] // each, keys.shape[2] // each, dtype=torch.float64)
        step = max(1, SCORES // (squares.shape[1] * squares.shape[2]))
        for b in range(batch):
            hidden = ~squares[b if squares.shape[0] > 1 else 0]
            for some in torch.arange(heads, device=q.device).split(step):
                score = rows[b, some] @ keys[b, some // per_kv].transpose(1, 2) * (scale / self.stride)
                weight = torch.nan_to_num(torch.softmax(score.masked_fill_(hidden, -torch.inf), -1))
                out[b, some] = weight.unflatten(2, (-1, each)).sum(3).unflatten(1, (-1, each)).sum(2).double()
        return torch.nan_to_num(out / out.sum(-1, keepdim=True))


def _joined(x: Tensor, real: Tensor, stride: int, block: int, reverse: bool = False) -> Tensor:
    """``(B, H, n / stride, stride · D)``: consecutive rows side by side, zeros for padding, n a multiple of ``block``."""
    x = torch.where(real[:, None, :, None], x.to(compute_dtype(x.dtype)), 0.0)
    x = pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, stride))
    return (x.flip(3) if reverse else x).flatten(3)
