"""Tiles of a neighborhood, from the closed forms of its axes; no pair of tokens is evaluated.

A window is a product over axes, so whether two tiles meet, and whether every pair in them is visible, is a product over axes too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..core.base_mask import EMPTY, FULL, PARTIAL, BaseMask, Predicate
from ..core.grid import Axis
from ..core.tiles import pick, product_sum, row_major
from .neighborhood_place import Place, extra_slots, per_slot

BLOCK = 128


def tile_kinds(place: Place) -> tuple[tuple[int, int], Tensor]:
    """``(q_block, kv_block)`` and ``(q tiles, key tiles)`` int8 kinds."""
    if place.tilings is not None:
        size = math.prod(place.tilings[0].tile), math.prod(place.tilings[1].tile)
        kinds = _box_kinds(place)
    else:
        size = BLOCK, BLOCK
        kinds = _run_kinds(place)
    shape = [-(-n // t) for n, t in zip((place.q_len, place.kv_len), size, strict=True)]
    grown = torch.full(shape, EMPTY, dtype=torch.int8)
    kinds = kinds[: shape[0], : shape[1]]
    grown[: kinds.shape[0], : kinds.shape[1]] = kinds
    return size, _with_extra(place, grown, size) if place.extra else grown


def _box_kinds(place: Place) -> Tensor:
    assert place.tilings is not None
    rank, tilings = len(place.axes), place.tilings
    touches = covers = torch.ones((), dtype=torch.bool)
    for a, axis in enumerate(place.axes):
        sizes = [t.tile[a] for t in tilings]
        real = torch.zeros(axis.dilation, tilings[0].counts[a], dtype=torch.bool)  # tiles without padding queries
        for g in range(axis.dilation):
            real[g, : axis.group_length(g) // sizes[0]] = True
        meets, whole = axis.tile_kinds(*sizes)
        shape = [1] * 4 * rank
        for place_of, n in zip(range(a, 4 * rank, rank), (axis.dilation, tilings[0].counts[a], axis.dilation, tilings[1].counts[a]), strict=True):  # fmt: skip
            shape[place_of] = n
        touches = touches & meets.view(shape)
        covers = covers & (whole & real.view(-1, 1)).view(shape)
    kinds = touches.to(torch.int8) * PARTIAL
    kinds[covers] = FULL
    counts = [math.prod(t.counts) * math.prod(t.dilation) for t in tilings]
    return kinds.reshape(counts[0], counts[1])


def _run_kinds(place: Place) -> Tensor:
    rest = place.rest
    if rest is None:
        touches = row_major_touches(place.axes, BLOCK, BLOCK, place.first, place.q_len)
        return touches.to(torch.int8) * PARTIAL
    start, end = (x.repeat_interleave(rest) * rest for x in place.axes[0].spans())
    rows = slice(place.first, place.first + place.q_len)
    lo, hi = start[rows][None], end[rows][None].clamp(max=place.kv_len)
    lo = torch.minimum(lo, hi)
    near = BaseMask(lo.shape[1], place.kv_len, lo, hi, place.first, False, torch.arange(place.kv_len)[None])
    return near.block_map(BLOCK, BLOCK)[0]


def row_major_touches(axes: Sequence[Axis], q_block: int, kv_block: int, first: int, q_len: int) -> Tensor:
    """``(q tiles, key tiles)`` bool: which runs of ``kv_block`` row-major tokens the windows of ``q_block`` row-major queries touch.

    Exact without dilation on the last axis; with it, the keys between two dilated ones count as touched.
    """
    width, tokens = axes[-1].length, math.prod(axis.length for axis in axes)
    steps = row_major(tuple(axis.length for axis in axes[:-1]))
    lead = product_sum([pick(step, axis.keys()) for step, axis in zip(steps, axes[:-1], strict=True)] or [torch.zeros(1, 1, dtype=torch.long)])  # fmt: skip
    token = torch.arange(first, min(first + q_len, tokens))
    block = torch.div(token - first, q_block, rounding_mode="floor")
    line = torch.div(token, width, rounding_mode="floor")
    begins = (block.diff() != 0) | (line.diff() != 0)  # a segment is what a block and a line share
    segment = torch.nn.functional.pad(begins.long().cumsum(0), (min(1, token.numel()), 0))
    count = int(segment[-1]) + 1 if segment.numel() else 0
    keys = axes[-1].keys()
    ends = keys.amax(-1) + 1
    x = token % width
    left = torch.full((count,), width).scatter_reduce(0, segment, keys[x, 0], "amin")
    right = torch.zeros(count, dtype=torch.long).scatter_reduce(0, segment, ends[x], "amax")
    at = torch.zeros(count, dtype=torch.long).scatter(
        0, segment, torch.arange(token.numel())
    )  # any token of the segment
    lines = lead[line[at]]  # (segments, key lines)
    ok = lines >= 0
    begin = torch.div(lines * width + left[:, None], kv_block, rounding_mode="floor")[ok]
    after = torch.div(lines * width + right[:, None] - 1, kv_block, rounding_mode="floor")[ok] + 1
    row = block[at][:, None].expand_as(lines)[ok]
    n_q, n_k = -(-q_len // q_block), -(-tokens // kv_block)
    change = torch.zeros(n_q * (n_k + 1), dtype=torch.int32)
    one = torch.ones_like(row, dtype=torch.int32)
    change.index_add_(0, row * (n_k + 1) + begin, one).index_add_(0, row * (n_k + 1) + after, -one)
    return change.view(n_q, n_k + 1).cumsum(-1)[:, :-1] > 0


def _with_extra(place: Place, kinds: Tensor, size: tuple[int, int]) -> Tensor:
    """``kinds`` with the rows and columns of slots outside the grid."""
    codes = [axis.codes() for axis in place.axes]
    q_extra, k_extra = extra_slots(place)
    q_real = (per_slot(place, 0, [c[2] for c in codes], 0)[0] > 0) | q_extra
    k_real = (per_slot(place, 1, [c[0] for c in codes], -1)[0] >= 0) | k_extra

    def blocks(flags: Tensor, block: int, how: Callable[[Tensor], Tensor], fill: bool) -> Tensor:
        return how(torch.nn.functional.pad(flags, (0, -flags.numel() % block), value=fill).view(-1, block))

    def some(flags: Tensor, block: int) -> Tensor:
        return blocks(flags, block, lambda x: x.any(-1), False)

    def every(flags: Tensor, block: int) -> Tensor:
        return blocks(flags, block, lambda x: x.all(-1), True)

    q_some, k_some = some(q_extra, size[0])[:, None], some(k_extra, size[1])[None]
    kinds = torch.where(q_some | k_some, PARTIAL, kinds.to(torch.long))
    whole = (every(q_extra, size[0])[:, None] & every(k_real, size[1])) | (
        every(q_real, size[0])[:, None] & every(k_extra, size[1])
    )
    return torch.where(whole, FULL, kinds).to(torch.int8)


def mask_mod(place: Place, device: torch.device) -> Predicate:
    codes = [axis.codes() for axis in place.axes]
    low = [x.to(device) for x in per_slot(place, 0, [c[1] for c in codes], 0)]
    high = [x.to(device) for x in per_slot(place, 0, [c[2] for c in codes], 0)]
    at = [x.to(device) for x in per_slot(place, 1, [c[0] for c in codes], -1)]
    if not place.extra:

        def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            kept = (at[0][k] >= low[0][q]) & (at[0][k] < high[0][q])
            for a in range(1, len(at)):
                kept = kept & (at[a][k] >= low[a][q]) & (at[a][k] < high[a][q])
            return kept

        return inside
    q_extra, k_extra = (x.to(device) for x in extra_slots(place))
    q_real, k_real = (high[0] > low[0]) | q_extra, (at[0] >= 0) | k_extra

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (at[0][k] >= low[0][q]) & (at[0][k] < high[0][q])
        for a in range(1, len(at)):
            near = near & (at[a][k] >= low[a][q]) & (at[a][k] < high[a][q])
        return near | (k_extra[k] & q_real[q]) | (q_extra[q] & k_real[k])

    return kept
