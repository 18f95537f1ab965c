"""Neighborhood attention as a function and as modules, on heads-last grids ``(B, X, Y, Z, heads, head_dim)``.

Source: FNA (arXiv 2403.04690) and GNA (arXiv 2504.16922). Names of arguments and parameters follow the NATTEN library, so that its users
and their checkpoints (``qkv``, ``proj``) find their way; the pattern underneath is ``foveal.patterns.Neighborhood``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError
from ..core.grid import Axis
from ..kernels.dispatch import attention, check_tensors
from ..kernels.merge import merge
from ..kernels.unfused import unfused
from ..patterns.neighborhood import Neighborhood

Sizes = int | Sequence[int]
Form = Literal["fused", "gemm", "naive"]
Order = Literal["auto", "rows", "tiles"]
FORMS, ORDERS = get_args(Form), get_args(Order)

CPU_TILE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}
GPU_TILE = {1: (128,), 2: (16, 8), 3: (2, 8, 8)}


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: Sizes,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    is_causal: bool | Sequence[bool] = False,
    *,
    scale: float | None = None,
    k_extra: Tensor | None = None,
    v_extra: Tensor | None = None,
    form: Form = "fused",
    order: Order = "auto",
    q_tile: Sequence[int] | None = None,
    kv_tile: Sequence[int] | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every token of a 1-D, 2-D or 3-D grid over its nearest neighbours.

    Args:
        q: ``(B, *grid, H, D)``. k: ``(B, *grid, Hkv, D)``. v: ``(B, *grid, Hkv, Dv)``; H is a multiple of Hkv.
        kernel_size, stride, dilation, is_causal: one value, or one per axis; see ``Neighborhood`` (``kernel_size`` is its window).
        scale: of ``q·k``; default ``1/sqrt(D)``. An explicit 0.0 is honoured.
        k_extra, v_extra: ``(B, M, Hkv, D or Dv)`` tokens outside the grid that every query sees.
        form: "fused" stores no weights; "gemm" and "naive" do (``kernels.unfused``).
        order: of the fused form: "rows" leaves tokens in place, "tiles" permutes them into tiles first; "auto" takes rows where
            exact lists are possible.
        q_tile, kv_tile: tile shapes for "tiles", and ``q_tile`` for "gemm"; default 64 tokens on CPU, 128 on GPU.
        impl: implementation of the fused form. return_lse: also return ``(B, *grid, H)`` log-sum-exps.

    Returns:
        ``(B, *grid, H, Dv)``.

    Raises:
        ShapeError: tensors that do not fit each other. ConfigError: an unknown form or order; a window, stride, dilation or tile
            that does not fit the grid.
    """
    pattern = _checked(q, k, v, (kernel_size, stride, dilation, is_causal), (k_extra, v_extra))
    grid = pattern.grid
    assert grid is not None
    _check_way(len(grid), form, order, q_tile, kv_tile)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    sums: Tensor | None
    if form != "fused":
        out, sums = _with_weights(q, k, v, pattern.axes(), scale, form, q_tile, k_extra, v_extra)
    else:
        if order == "auto":
            order = "tiles" if q_tile is not None or not _prefers_rows(pattern, q.device) else "rows"
        tiles = GPU_TILE if q.device.type == "cuda" else CPU_TILE
        if order == "tiles":
            chosen = tuple(min(t, n) for t, n in zip(q_tile or tiles[len(grid)], grid, strict=True))
            keys = tuple(min(t, n) for t, n in zip(kv_tile or chosen, grid, strict=True))
            pattern = pattern.tiled(chosen, keys)
        out, sums = _fused(q, k, v, pattern, scale, k_extra, v_extra, impl, return_lse)
    out = out.unflatten(1, grid)
    return (out, sums.unflatten(1, grid)) if return_lse and sums is not None else out


def _checked(
    q: Tensor, k: Tensor, v: Tensor, fields: tuple[Any, ...], extra: tuple[Tensor | None, Tensor | None]
) -> Neighborhood:
    if not 4 <= q.dim() <= 6:
        raise ShapeError(f"q has shape {tuple(q.shape)}; expected (B, X, H, D), (B, X, Y, H, D) or (B, X, Y, Z, H, D).")
    for name, t in (("k", k), ("v", v)):
        if t.dim() != q.dim() or t.shape[:-2] != q.shape[:-2] or t.shape[-2] != k.shape[-2]:
            raise ShapeError(
                f"{name} has shape {tuple(t.shape)} and q {tuple(q.shape)}; expected the same batch and grid, and as many "
                "heads in k and v."
            )
    check_tensors(*map(_heads_first, (q, k, v)))
    k_extra, v_extra = extra
    if (k_extra is None) != (v_extra is None):
        raise ShapeError("only one of k_extra and v_extra is given; expected both, or neither.")
    count = 0
    if k_extra is not None and v_extra is not None:
        count = k_extra.shape[1]
        for name, t, like in (("k_extra", k_extra, k), ("v_extra", v_extra, v)):
            if t.dim() != 4 or t.shape[:2] != (q.shape[0], count) or t.shape[2:] != like.shape[-2:]:
                raise ShapeError(
                    f"{name} has shape {tuple(t.shape)}; expected (B={q.shape[0]}, M, {like.shape[-2]}, {like.shape[-1]})."
                )
    grid = tuple(q.shape[1:-2])
    _check_sizes(len(grid), *fields)
    window, stride, dilation, causal = (tuple(x) if isinstance(x, Sequence) else x for x in fields)
    try:
        return Neighborhood(grid, window, stride, dilation, causal, count)
    except ConfigError as error:  # in the words of this function
        raise ConfigError(str(error).replace("window is", "kernel_size is")) from None


def _check_way(
    rank: int, form: Form, order: Order, q_tile: Sequence[int] | None, kv_tile: Sequence[int] | None
) -> None:
    for name, word, known in (("form", form, FORMS), ("order", order, ORDERS)):
        if word not in known:
            raise ConfigError(f"{name} is {word!r}; expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}.")
    for name, tile in (("q_tile", q_tile), ("kv_tile", kv_tile)):
        if tile is not None and not (isinstance(tile, Sequence) and len(tile) == rank and all(map(_is_size, tile))):
            raise ConfigError(
                f"{name} is {tile!r}; expected {rank} whole numbers of at least 1, one per axis, or None."
            )


def _check_sizes(
    rank: int, kernel_size: Sizes, stride: Sizes, dilation: Sizes, is_causal: bool | Sequence[bool]
) -> None:
    """What can be said without the tokens per axis."""
    spread = {}
    for name, value in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation), ("is_causal", is_causal)):  # fmt: skip
        each = tuple(value) if isinstance(value, Sequence) else (value,) * rank
        what, fits = ("True or False", _is_flag) if name == "is_causal" else ("a whole number of at least 1", _is_size)
        if len(each) != rank or not all(map(fits, each)):
            raise ConfigError(
                f"{name} is {value!r}; expected {what}" + (f", or {rank}, one per axis." if rank > 1 else ".")
            )
        spread[name] = each
    if any(s > w for s, w in zip(spread["stride"], spread["kernel_size"], strict=True)):
        raise ConfigError(f"stride is {stride!r}; expected at most kernel_size, {kernel_size!r}, on every axis.")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _prefers_rows(pattern: Neighborhood, device: torch.device) -> bool:
    """Queries that share a window can be gathered where they are; a single axis is always in tile order."""
    axes = pattern.axes()
    shared = math.prod(axis.stride for axis in axes) >= 16 and not any(axis.causal for axis in axes)
    whole = all(axis.whole for axis in axes[1:]) and axes[0].dilation == 1
    return whole or (shared and device.type != "cuda")


def _heads_first(x: Tensor) -> Tensor:
    """``(B, *grid, H, D)`` as a view ``(B, H, N, D)``."""
    return x.flatten(1, -3).transpose(1, 2)


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Neighborhood,
    scale: float,
    k_extra: Tensor | None,
    v_extra: Tensor | None,
    impl: str,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(B, N, H, Dv)`` and ``(B, N, H)``, both row-major."""
    q, k, v = (_heads_first(x) for x in (q, k, v))
    tilings = pattern.tilings() if pattern.q_tile is not None else None
    if tilings is not None:
        q, k, v = tilings[0].permute(q), tilings[1].permute(k), tilings[1].permute(v)
    if k_extra is not None and v_extra is not None:
        k, v = torch.cat([k, k_extra.transpose(1, 2)], 2), torch.cat([v, v_extra.transpose(1, 2)], 2)
    if return_lse:
        out, lse = attention(q, k, v, pattern, scale=scale, impl=impl, return_lse=True)
        lse = lse if tilings is None else tilings[0].restore(lse, -1)
        lse = lse.transpose(1, 2)
    else:
        out, lse = attention(q, k, v, pattern, scale=scale, impl=impl), None
    out = out if tilings is None else tilings[0].restore(out)
    return out.transpose(1, 2), lse


def _with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    form: Form,
    tile: Sequence[int] | None,
    k_extra: Tensor | None,
    v_extra: Tensor | None,
) -> tuple[Tensor, Tensor]:
    assert form != "fused"
    q, k, v = (_heads_first(x) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out, lse, _ = unfused(q, k, v, axes, scale=scale, form=form, tile=None if tile is None else tuple(tile))
    if k_extra is not None and v_extra is not None:
        beside, beside_lse = attention(
            q, k_extra.transpose(1, 2), v_extra.transpose(1, 2), scale=scale, return_lse=True
        )
        out, lse = merge([out, beside], [lse, beside_lse])
    return out.transpose(1, 2), lse.transpose(1, 2)


class _NeighborhoodAttention(nn.Module):
    rank: ClassVar[int]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        is_causal: bool | Sequence[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        channels_first: bool = False,
        form: Form = "fused",
        order: Order = "auto",
        q_tile: Sequence[int] | None = None,
        kv_tile: Sequence[int] | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ConfigError(
                f"{type(self).__name__}.num_heads is {num_heads} for embed_dim {embed_dim}; expected a divisor of embed_dim."
            )
        _check_way(self.rank, form, order, q_tile, kv_tile)
        _check_sizes(self.rank, kernel_size, stride, dilation, is_causal)
        self.num_heads, self.channels_first = num_heads, channels_first
        self.window = (kernel_size, stride, dilation, is_causal)
        self.qk_scale, self.form, self.order, self.impl = qk_scale, form, order, impl
        self.q_tile, self.kv_tile = q_tile, kv_tile
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        channel = 1 if self.channels_first else -1
        if x.dim() != self.rank + 2 or x.shape[channel] != self.qkv.in_features:
            wanted = ", ".join("XYZ"[: self.rank])
            shape = f"(B, C, {wanted})" if self.channels_first else f"(B, {wanted}, C)"
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected {shape} with C = {self.qkv.in_features}.")
        x = x.movedim(1, -1) if self.channels_first else x
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = neighborhood_attention(
            q, k, v, *self.window, scale=self.qk_scale, form=self.form, order=self.order,
            q_tile=self.q_tile, kv_tile=self.kv_tile, impl=self.impl,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        out = self.proj_drop(self.proj(out.flatten(-2)))
        return out.movedim(-1, 1) if self.channels_first else out

    def extra_repr(self) -> str:
        return "kernel_size={}, stride={}, dilation={}, is_causal={}".format(*self.window) + f", form={self.form!r}"


_MODULE = """Neighborhood attention on {rank}-D grids: ``(B, {grid}, C)``, or ``(B, C, {grid})`` with ``channels_first``.

    Args:
        embed_dim: C. num_heads: a divisor of it.
        kernel_size, stride, dilation, is_causal: one value, or {rank}; see ``foveal.patterns.Neighborhood``.
        qkv_bias: of the projection ``qkv``. qk_scale: default ``1/sqrt(head_dim)``. proj_drop: dropout after ``proj``.
        channels_first: the layout of vision models.
        form, order, q_tile, kv_tile, impl: how it is computed; see ``neighborhood_attention``.

    Raises:
        ConfigError: ``num_heads`` does not divide ``embed_dim``; a window, stride, dilation, form, order or tile that fits no grid; at
            the first forward, a window that does not fit the grid.
    """


class NeighborhoodAttention1d(_NeighborhoodAttention):
    __doc__ = _MODULE.format(rank=1, grid="X")
    rank = 1


class NeighborhoodAttention2d(_NeighborhoodAttention):
    __doc__ = _MODULE.format(rank=2, grid="X, Y")
    rank = 2


class NeighborhoodAttention3d(_NeighborhoodAttention):
    __doc__ = _MODULE.format(rank=3, grid="X, Y, Z")
    rank = 3
