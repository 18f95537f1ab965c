"""Depthwise convolution on sparse voxels in plain PyTorch: outputs where inputs are, missing neighbours count as zero.

Neighbours are found once per set of coordinates by a sorted search; every layer on the same voxels shares them. Work and memory
go with the neighbours that exist, not with taps times voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.errors import ConfigError, ShapeError
from .call import compute_dtype
from .pooling import full_precision

Offsets = tuple[tuple[int, int, int], ...]


def box(sizes: Sequence[int]) -> Offsets:
    """``(z, y, x)`` offsets of a centred kernel, the last axis fastest.

    Raises:
        ConfigError: an even size, which has no centre.
    """
    if len(sizes) != 3 or any(n < 1 or n % 2 == 0 for n in sizes):
        raise ConfigError(f"the kernel has sizes {tuple(sizes)}; expected three odd numbers, (z, y, x).")
    z, y, x = (range(-(n // 2), n // 2 + 1) for n in sizes)
    return tuple(product(z, y, x))


@dataclass(frozen=True, eq=False)
class Neighbors:
    """For every offset the voxels that have a neighbour there.

    Attributes:
        to: per offset ``(p,)`` int64 voxels; source: per offset ``(p,)`` int64 the neighbour of each. count: voxels in all.
    """

    to: tuple[Tensor, ...]
    source: tuple[Tensor, ...]
    count: int

    @classmethod
    def find(cls, coords: Tensor, offsets: Offsets) -> Neighbors:
        """Neighbours of voxels ``coords`` ``(V, 4)``, integers (batch, z, y, x), at ``offsets``.

        Raises:
            ShapeError: coordinates of another shape or dtype, or two voxels at one place.
        """
        check_coords(coords)
        if not len(coords):
            empty = tuple(coords.new_zeros(0, dtype=torch.int64) for _ in offsets)
            return cls(empty, empty, 0)
        c = coords.long()
        reach = torch.tensor(offsets).abs().amax(0).tolist()
        low = c.amin(0)
        extent = (c.amax(0) - low + 1).tolist()
        strides = [0, 0, 0, 1]
        for axis in (2, 1, 0):  # room around every axis, so that no offset reaches into the next row
            strides[axis] = strides[axis + 1] * (extent[axis + 1] + 2 * reach[axis])
        key = ((c - low) * torch.tensor(strides, device=c.device)).sum(-1)
        ordered, order = key.sort()
        twice = (ordered.diff() == 0).nonzero()
        if len(twice):
            place = coords[order[twice[0, 0]]].tolist()
            raise ShapeError(
                f"coords names the place {tuple(place)} (batch, z, y, x) more than once; expected one voxel per place: merge them first."
            )
        to, source = [], []
        for offset in offsets:
            wanted = key + sum(d * s for d, s in zip(offset, strides[1:], strict=True))
            at = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
            there = (ordered[at] == wanted).nonzero()[:, 0]
            to.append(there)
            source.append(order[at[there]])
        return cls(tuple(to), tuple(source), len(coords))


def check_coords(coords: Tensor) -> None:
    """Raise :class:`ShapeError` unless ``coords`` is ``(V, 4)`` of integers."""
    if coords.dim() != 2 or coords.shape[1] != 4 or coords.is_floating_point() or coords.dtype == torch.bool:
        raise ShapeError(
            f"coords has shape {tuple(coords.shape)} and dtype {coords.dtype}; expected (voxels, 4) integers (batch, z, y, x)."
        )


@torch.compiler.disable  # sizes depend on the data
def depthwise(x: Tensor, weight: Tensor, neighbors: Neighbors) -> Tensor:
    """``out_i = Σ_t weight_t ⊙ x[neighbour of i at offset t]``.

    Args:
        x: ``(V, C)``. weight: ``(T, C)``, one row per offset. neighbors: of these voxels and offsets.

    Returns:
        ``(V, C)`` in x's dtype, summed in float32 at least.

    Raises:
        ShapeError: shapes that do not fit.
    """
    if x.dim() != 2 or weight.shape != (len(neighbors.to), x.shape[1]) or len(x) != neighbors.count:
        raise ShapeError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected ({neighbors.count}, C) and ({len(neighbors.to)}, C)."
        )
    return _Depthwise.apply(x, weight, neighbors)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, neighbors: Neighbors) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.neighbors = neighbors
        dtype = compute_dtype(x.dtype)
        out = torch.zeros(x.shape, dtype=dtype, device=x.device)
        with full_precision(x):
            for to, source, w in zip(neighbors.to, neighbors.source, weight.to(dtype), strict=True):
                out.index_add_(0, to, x.index_select(0, source) * w)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dtype = compute_dtype(x.dtype)
        dx = torch.zeros(x.shape, dtype=dtype, device=x.device)
        dw = torch.zeros(weight.shape, dtype=dtype, device=x.device)
        neighbors: Neighbors = ctx.neighbors
        with full_precision(x):
            for t, (to, source) in enumerate(zip(neighbors.to, neighbors.source, strict=True)):
                g = grad.index_select(0, to).to(dtype)
                dw[t] = (g * x.index_select(0, source)).sum(0)
                dx.index_add_(0, source, g * weight[t].to(dtype))
        return dx.to(x.dtype), dw.to(weight.dtype), None
