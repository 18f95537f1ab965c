"""Neighborhood attention with its weights in memory: the naive and the GEMM form of FNA (arXiv 2403.04690).

Three primitives over neighbour lists make both passes; ``P`` and ``A`` hold one number per query and neighbour:

- ``pn(q, k)``, pointwise–neighborhood: ``A[n, j] = q_n · k_ρ(n, j)``; also ``dP = pn(do, v)``;
- ``nn(P, v)``, neighborhood–neighborhood: ``o_n = Σ_j P[n, j] v_ρ(n, j)``; also ``dq = nn(dA, k)``;
- ``inn(P, y)``, inverse-neighborhood: ``z_m = Σ_(n, j): ρ(n, j) = m P[n, j] y_n``; gives ``dv = inn(P, do)``, ``dk = inn(dA, q)``.

*Naive* gathers every query's neighbours: one matrix–vector product per query. *GEMM* multiplies a tile of queries with the halo of
all its keys and scatters the wanted products. Both take memory O(N · window); the fused form is ``foveal.attention`` with the
pattern ``Neighborhood``. Only here can weights be looked at and a relative position bias be used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.grid import Axis
from ..core.tiles import pick, product_sum, row_major

Form = Literal["naive", "gemm"]
SCRATCH = 1 << 23
"""Elements of scratch memory that one step may take."""
TILE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
"""Query tiles of 64 tokens, as in the paper."""


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Boxes of rows, the region of the other side that they meet, and where each pair sits in the neighbour list.

    Attributes:
        rows: ``(tiles, T)`` row-major tokens, −1 pads. region: ``(tiles, R)``, −1 pads.
        column: forward ``(tiles, T, W)``: place of neighbour ``j`` in the region. Inverse ``(tiles, T, R)``: the neighbour number
            ``j`` with which the region's query lists the row's key. −1 for none.
    """

    rows: Tensor
    region: Tensor
    column: Tensor


@dataclass(frozen=True)
class Neighbors:
    """The neighbour lists of a grid, row-major over window offsets, axis 0 slowest.

    Attributes:
        axes: of the grid. tile: box of tokens per matrix product; None takes 64 tokens.
    """

    axes: tuple[Axis, ...]
    tile: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        return math.prod(axis.length for axis in self.axes)

    @property
    def width(self) -> int:
        """Slots per query."""
        return math.prod(axis.window for axis in self.axes)

    @cached_property
    def index(self) -> Tensor:
        """``(N, W)`` int64 keys; −1 where a causal window holds fewer."""
        steps = row_major(tuple(axis.length for axis in self.axes))
        return product_sum([pick(step, axis.keys()) for step, axis in zip(steps, self.axes, strict=True)])

    @cached_property
    def hidden(self) -> Tensor | None:
        """``(N, W)`` bool, True on slots without a key; None when there are none."""
        return self.index < 0 if any(axis.causal for axis in self.axes) else None

    @cached_property
    def relative(self) -> Tensor:
        """``(N, W)`` int64 entries of a flattened bias table of shape ``(2w_0 − 1, 2w_1 − 1, …)``."""
        sizes = tuple(2 * axis.window - 1 for axis in self.axes)
        parts = []
        for step, axis in zip(row_major(sizes), self.axes, strict=True):
            keys, own = axis.keys(), torch.arange(axis.length)[:, None]
            apart = torch.div(keys, axis.dilation, rounding_mode="floor") - torch.div(
                own, axis.dilation, rounding_mode="floor"
            )
            parts.append(pick(step, torch.where(keys >= 0, apart + axis.window - 1, -1)))
        return product_sum(parts)

    @cached_property
    def forward_tiles(self) -> _Tiles:
        """Query tiles and the halo of their keys."""
        return self._combined([_forward(axis, t) for axis, t in zip(self.axes, self._tile, strict=True)])

    @cached_property
    def inverse_tiles(self) -> _Tiles:
        """Key tiles and the region of the queries that see them, by the closed-form inverse window."""
        return self._combined([_inverse(axis, t) for axis, t in zip(self.axes, self._tile, strict=True)])

    @property
    def _tile(self) -> tuple[int, ...]:
        return self.tile or TILE.get(len(self.axes), (2,) * len(self.axes))

    def _combined(self, parts: list[tuple[Tensor, Tensor, Tensor, int]]) -> _Tiles:
        steps = row_major(tuple(axis.length for axis in self.axes))
        rows, regions = (
            product_sum([pick(step, table) for step, table in zip(steps, tables, strict=True)])
            for tables in ([part[0] for part in parts], [part[1] for part in parts])
        )
        sizes = row_major(tuple(part[3] for part in parts))
        columns = [pick(size, part[2]) for size, part in zip(sizes, parts, strict=True)]
        return _Tiles(rows, regions, product_sum(columns))


def _along(axis: Axis) -> Iterator[tuple[int, Tensor, Tensor]]:
    for g in range(axis.dilation):
        yield g, *axis.spans(g)


def _forward(axis: Axis, tile: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Per axis: rows ``(n, T)``, halo ``(n, R)``, column ``(n, T, w)``, and the halo's length."""
    found: list[list[Tensor]] = [[], [], []]
    spans = [axis.tile_spans(tile, g) for g in range(axis.dilation)]
    reach = max(int((b - a).max()) for a, b, _, _ in spans)
    for g, start, end in _along(axis):
        length = start.numel()
        x = torch.arange(spans[g][0].numel() * tile).view(-1, tile)
        real = x < length
        x = x.clamp(max=length - 1)
        begin = torch.minimum(spans[g][0], torch.tensor(max(length - reach, 0)))[:, None]
        halo = begin + torch.arange(reach)
        neighbor = start[x][..., None] + torch.arange(axis.window)
        found[0].append(torch.where(real, x * axis.dilation + g, -1))
        found[1].append(torch.where(halo < length, halo * axis.dilation + g, -1))
        ok = real[..., None] & (neighbor < end[x][..., None])
        found[2].append(torch.where(ok, neighbor - begin[..., None], -1))
    return torch.cat(found[0]), torch.cat(found[1]), torch.cat(found[2]), reach


def _inverse(axis: Axis, tile: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Per axis: rows ``(n, T)``, region of queries ``(n, R)``, neighbour number ``(n, T, R)``, and how many numbers there are."""
    found: list[list[Tensor]] = [[], [], []]
    spans = []
    for g in range(axis.dilation):
        lo, hi = axis.queries(g)
        first = torch.arange(0, lo.numel(), tile)
        spans.append((lo[first], hi[(first + tile - 1).clamp(max=lo.numel() - 1)]))
    reach = max(int((b - a).max()) for a, b in spans)
    for g, start, end in _along(axis):
        length = start.numel()
        x = torch.arange(spans[g][0].numel() * tile).view(-1, tile)
        query = spans[g][0][:, None] + torch.arange(reach)
        real = query < length
        at = query.clamp(max=length - 1)
        number = x[..., None] - start[at][:, None]
        ok = (x < length)[..., None] & real[:, None] & (number >= 0) & (x[..., None] < end[at][:, None])
        found[0].append(torch.where(x < length, x * axis.dilation + g, -1))
        found[1].append(torch.where(real, query * axis.dilation + g, -1))
        found[2].append(torch.where(ok, number, -1))
    return torch.cat(found[0]), torch.cat(found[1]), torch.cat(found[2]), axis.window


@functools.lru_cache(maxsize=16)
def neighbors(axes: tuple[Axis, ...], tile: tuple[int, ...] | None = None) -> Neighbors:
    """The neighbour lists of these axes, kept between calls."""
    return Neighbors(axes, tile)


# --- the primitives ------------------------------------------------------------------------------------------------


def _parts(total: int, each: int) -> Iterator[slice]:
    step = max(1, SCRATCH // max(each, 1))
    return (slice(i, min(i + step, total)) for i in range(0, total, step))


def pn(q: Tensor, k: Tensor, near: Neighbors, form: Form = "naive") -> Tensor:
    """``A[n, j] = q_n · k_ρ(n, j)``, ``(B, H, N, W)`` from ``(B, H, N, D)`` each; 0 on slots without a key."""
    batch, heads, tokens, dim = q.shape
    out = q.new_zeros(batch, heads, tokens, near.width)
    if form == "naive":
        for part in _parts(tokens, batch * heads * near.width * dim):
            keys = _rows(k, near.index[part].to(q.device))
            out[:, :, part] = (keys @ q[:, :, part, :, None])[..., 0]
        return out if near.hidden is None else out.masked_fill_(near.hidden.to(q.device), 0)
    tiles = near.forward_tiles
    for part in _parts(tiles.rows.shape[0], batch * heads * tiles.rows.shape[1] * tiles.region.shape[1]):
        rows, region, column = (t[part].to(q.device) for t in (tiles.rows, tiles.region, tiles.column))
        products = _rows(q, rows) @ _rows(k, region).transpose(-1, -2)
        wanted = products.gather(-1, column.clamp(min=0).expand(batch, heads, -1, -1, -1))
        real = rows >= 0
        out[:, :, rows[real]] = wanted.masked_fill_(column < 0, 0)[:, :, real]
    return out


def nn(p: Tensor, v: Tensor, near: Neighbors, form: Form = "naive") -> Tensor:
    """``o_n = Σ_j P[n, j] v_ρ(n, j)``, ``(B, H, N, C)`` from ``(B, H, N, W)`` and ``(B, H, N, C)``."""
    batch, heads, tokens, dim = v.shape
    out = v.new_zeros(batch, heads, tokens, dim)
    if form == "naive":
        hidden = near.hidden
        for part in _parts(tokens, batch * heads * near.width * dim):
            weights = p[:, :, part] if hidden is None else p[:, :, part].masked_fill(hidden[part].to(v.device), 0)
            out[:, :, part] = (weights[..., None, :] @ _rows(v, near.index[part].to(v.device)))[..., 0, :]
        return out
    tiles = near.forward_tiles
    for part in _parts(tiles.rows.shape[0], batch * heads * tiles.rows.shape[1] * tiles.region.shape[1]):
        rows, region, column = (t[part].to(v.device) for t in (tiles.rows, tiles.region, tiles.column))
        reach = region.shape[1]
        spread = v.new_zeros(batch, heads, *rows.shape, reach + 1)  # the last column takes slots without a key
        column = torch.where(column < 0, reach, column).expand(batch, heads, -1, -1, -1)
        spread.scatter_(-1, column, _rows(p, rows))
        real = rows >= 0
        out[:, :, rows[real]] = (spread[..., :reach] @ _rows(v, region))[:, :, real]
    return out


def inn(p: Tensor, y: Tensor, near: Neighbors, form: Form = "naive") -> Tensor:
    """``z_m = Σ P[n, j] y_n`` over all ``(n, j)`` with ``ρ(n, j) = m``; ``(B, H, N, C)``. The adjoint of ``nn`` in v."""
    batch, heads, tokens, dim = y.shape
    out = y.new_zeros(batch, heads, tokens, dim)
    if form == "naive":
        for part in _parts(tokens, batch * heads * near.width * dim):
            index = near.index[part].to(y.device)
            terms = p[:, :, part, :, None] * y[:, :, part, None]
            terms = terms.masked_fill_((index < 0)[..., None], 0)
            out.index_add_(2, index.clamp(min=0).reshape(-1), terms.flatten(2, 3))
        return out
    tiles, flat = near.inverse_tiles, p.flatten(2)
    for part in _parts(tiles.rows.shape[0], batch * heads * tiles.rows.shape[1] * tiles.region.shape[1]):
        rows, region, column = (t[part].to(y.device) for t in (tiles.rows, tiles.region, tiles.column))
        at = region.clamp(min=0)[:, None] * near.width + column.clamp(min=0)
        weights = flat[:, :, at].masked_fill_(column < 0, 0)
        real = rows >= 0
        out[:, :, rows[real]] = (weights @ _rows(y, region))[:, :, real]
    return out


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """``x`` ``(B, H, N, C)`` at ``index`` ``(…)``: ``(B, H, …, C)``; what stands at negative entries does not matter."""
    return x.index_select(2, index.clamp(min=0).reshape(-1)).unflatten(2, tuple(index.shape))


# --- attention -----------------------------------------------------------------------------------------------------


class _Unfused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, near: Neighbors, form: Form
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = pn(q, k, near, form).mul_(scale)
        if bias is not None:
            logits += bias.flatten(1)[:, near.relative.clamp(min=0).to(q.device)]
        if near.hidden is not None:
            logits.masked_fill_(near.hidden.to(q.device), -torch.inf)
        lse = torch.logsumexp(logits.to(torch.promote_types(q.dtype, torch.float32)), -1)
        weights = torch.softmax(logits, -1)
        out = nn(weights, v, near, form)
        ctx.save_for_backward(q, k, v, bias, weights)
        ctx.scale, ctx.near, ctx.form = scale, near, form
        ctx.set_materialize_grads(False)
        return out, lse, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, grad_weights = upstream
        q, k, v, bias, weights = ctx.saved_tensors
        near, form = ctx.near, ctx.form
        grad_out = torch.zeros_like(v) if grad_out is None else grad_out.contiguous()
        grad_p = pn(grad_out, v, near, form)
        if grad_weights is not None:
            grad_p = grad_p + grad_weights
        grad_a = weights * (grad_p - (weights * grad_p).sum(-1, keepdim=True))
        if grad_lse is not None:
            grad_a = grad_a + weights * grad_lse[..., None].to(weights.dtype)
        table = None
        if bias is not None:
            flat = bias.new_zeros(bias.shape[0], bias[0].numel())
            per_head = grad_a.sum(0).flatten(1)
            table = flat.index_add_(1, near.relative.clamp(min=0).reshape(-1).to(q.device), per_head).view(bias.shape)
        grad_q = nn(grad_a, k, near, form).mul_(ctx.scale)
        grad_k = inn(grad_a, q, near, form).mul_(ctx.scale)
        return grad_q, grad_k, inn(weights, grad_out, near, form), table, None, None, None


def unfused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    *,
    scale: float,
    form: Form = "gemm",
    bias: Tensor | None = None,
    tile: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Neighborhood attention that keeps its weights.

    Args:
        q: ``(B, H, N, D)`` row-major tokens; k: ``(B, H, N, D)``; v: ``(B, H, N, Dv)``. Grouped heads are repeated by the caller.
        axes: of the grid. scale: of ``q·k``. form: how it is computed.
        bias: ``(H, 2w_0 − 1, 2w_1 − 1, …)`` relative position bias; entry ``key − query + w − 1`` of the group indices, per axis.
        tile: box of tokens per matrix product.

    Returns:
        ``out`` ``(B, H, N, Dv)``, ``lse`` ``(B, H, N)`` and ``weights`` ``(B, H, N, W)``, 0 on slots without a key. All differentiable.
    """
    return _Unfused.apply(q.contiguous(), k.contiguous(), v.contiguous(), bias, scale, neighbors(axes, tile), form)
