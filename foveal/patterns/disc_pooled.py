"""Discs with pooled tokens (CLEAR's down-sampled variant): what lies outside the disc is seen at low resolution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, State
from ..core.errors import ShapeError, UnsupportedError
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..kernels.merge import merge
from .dense import Dense
from .disc import Disc
from .operator import Operator, attend, dense_impl


@register("operator", "pooled_disc")
@dataclass(frozen=True)
class PooledDisc(Operator):
    """A disc, and for image queries one pooled token per cell of ``factor × factor`` image tokens besides.

    Attributes:
        disc: who sees whom at full resolution.
        factor: side of a cell; divides height and width.

    A pooled key (value) is the sum of the cell's keys (values), after norm and RoPE, times the pooling weights. State is the
    learned ``(factor, factor)`` weight, shared by all heads, channels, keys and values; None means ``1/factor²`` everywhere, the
    value at the start of training. Text queries do not see pooled tokens.
    """

    disc: Disc
    factor: int = 4

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "factor", low=1)

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, ctx: SelectContext, state: State, impl: str
    ) -> tuple[Tensor, Tensor, State]:
        """Merge the disc with dense attention over pooled tokens; gradients reach the weight."""
        if ctx.base.causal:
            raise UnsupportedError(
                "pooled_disc: the model is causal, and a pooled token mixes later keys; use disc alone."
            )
        height, width = self.disc.fit(ctx.base, ctx.grid)
        if height * width != q.shape[2] - self.disc.text or height % self.factor or width % self.factor:
            raise ShapeError(
                f"pooled_disc: factor is {self.factor} and the image has {q.shape[2] - self.disc.text} tokens on the grid "
                f"{(height, width)!r}; expected whole rows, and a factor that divides height and width. Pad the image."
            )
        weight = self._weight(state, k)
        out, lse, _ = attend(self.disc, q, k, v, ctx, impl=impl)
        text = self.disc.text
        cells = self._cells((height, width)).to(q.device)
        pooled_k, pooled_v = (pool(t[:, :, text:], weight, cells) for t in (k, v))
        base = BaseMask.build(height * width, cells.shape[0], causal=False, device=q.device)
        far_ctx = replace(ctx, base=base)
        far, far_lse, _ = attend(Dense(), q[:, :, text:], pooled_k, pooled_v, far_ctx, impl=dense_impl(impl))
        image, image_lse = merge([out[:, :, text:], far], [lse[:, :, text:], far_lse])
        return torch.cat([out[:, :, :text], image], 2), torch.cat([lse[:, :, :text], image_lse], 2), state

    def _weight(self, state: State, k: Tensor) -> Tensor:
        if state is None:
            return k.new_full((self.factor, self.factor), 1.0 / self.factor**2)
        if not isinstance(state, Tensor) or tuple(state.shape) != (self.factor, self.factor):
            shape = tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__
            raise ShapeError(
                f"state is {shape}; expected pooling weights of shape ({self.factor}, {self.factor}), or None for 1/{self.factor}²."
            )
        return state.to(k)

    def _cells(self, grid: tuple[int, int]) -> Tensor:
        """``(cells, factor²)`` int64: slots, counted from the first image token, of every cell."""
        slot = self.disc.order(grid)[self.disc.text :] - self.disc.text
        slot = slot.argsort().view(grid)  # where each row-major token stands
        f = self.factor
        return slot.unflatten(1, (-1, f)).unflatten(0, (-1, f)).transpose(1, 2).reshape(-1, f * f)


def pool(x: Tensor, weight: Tensor, cells: Tensor) -> Tensor:
    """Weighted sums over cells: ``(B, H, N, D)`` → ``(B, H, cells, D)``."""
    return torch.einsum("bhcfd,f->bhcd", x[:, :, cells], weight.flatten())
