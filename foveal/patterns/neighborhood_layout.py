"""The layout of a neighborhood: tiles, or exact lists of keys where queries share a window and that is cheaper."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..core.base_mask import EMPTY, PARTIAL
from ..core.errors import UnsupportedError
from ..core.layouts import Groups, KeySelection, Layout, block_mask
from ..core.tiles import Tiling, pick, product_sum, row_major
from .neighborhood_place import Place, offsets_of, slots_of
from .neighborhood_tiles import mask_mod, tile_kinds

LISTS_PAY = 1.25
"""Lists are taken where tiles would compute this many times their pairs; gathering single rows is a little slower than tiles."""
LISTED_ROWS = 8
"""Queries that must share a list before lists are considered."""


@functools.lru_cache(maxsize=32)
def layout_of(place: Place, batch: int, device: torch.device) -> Layout:
    """The layout of a place; made once, because it depends on lengths alone.

    Raises:
        UnsupportedError: "lists" is demanded where queries do not share windows.
    """
    if place.q_len == 1 and place.first < math.prod(place.grid) and place.layout != "blocks":
        return _moved(_one_query(place), device)
    lists = None if place.layout == "blocks" else _lists(place)
    if place.layout == "lists":
        if lists is None:
            raise UnsupportedError(
                "neighborhood: layout='lists' needs queries that share a window: no causal axis, and in tile order a stride that "
                "q_tile divides. Use layout='auto'."
            )
        return _moved(lists(batch), device)
    size, kinds = tile_kinds(place)
    if lists is not None and device.type != "cuda":
        computed = int((kinds > EMPTY).sum()) * size[0] * size[1]
        if computed > LISTS_PAY * place.q_len * (place.keys + place.extra):
            return _moved(lists(batch), device)
    mod = None if not bool((kinds == PARTIAL).any()) else mask_mod(place, device)
    return block_mask(kinds.to(device)[None, None], size, (place.q_len, place.kv_len), mod)


def _moved(layout: Layout, device: torch.device) -> Layout:
    if isinstance(layout, KeySelection):
        limit = None if layout.limit is None else layout.limit.to(device)
        return KeySelection(layout.index.to(device), layout.block_size, limit)
    assert isinstance(layout, Groups)
    q_index, cu_q, k_index, cu_k = (t.to(device) for t in (layout.q_index, layout.cu_q, layout.k_index, layout.cu_k))
    return Groups(q_index, cu_q, k_index, cu_k)


# --- exact keys ----------------------------------------------------------------------------------------------------


def _one_query(place: Place) -> KeySelection:
    parts, at = [], place.first
    for axis, offset, step in zip(place.axes, offsets_of(place, 1), row_major(place.grid), strict=True):
        x = at // int(step[1]) if axis.length > 1 else 0
        at -= x * int(step[1]) if axis.length > 1 else 0
        parts.append(pick(offset, axis.keys()[x : x + 1]))
    index = product_sum(parts)[0]
    index = index[(index >= 0) & (index < place.kv_len)].sort().values
    extra = math.prod(place.grid) + torch.arange(place.extra)
    return KeySelection(torch.cat([index, extra])[None, None, None], 1)


def _lists(place: Place) -> Callable[[int], Layout] | None:
    """How to make exact lists for a batch size, or None where queries do not share windows, or too few do."""
    if any(axis.causal for axis in place.axes):
        return None
    if place.tilings is not None:
        aligned = all(
            axis.whole or axis.stride % t == 0 for axis, t in zip(place.axes, place.tilings[0].tile, strict=True)
        )
        few = place.q_len == place.tilings[0].length and math.prod(place.tilings[0].tile) >= LISTED_ROWS
        return (lambda batch: _tile_lists(place)) if aligned and few else None
    rest = place.rest
    if rest is not None and not place.extra:
        rows = place.axes[0].stride * rest
        if place.first % rows == 0 and rows >= LISTED_ROWS:
            return lambda batch: _interval_lists(place, rows)
    shared = math.prod(axis.stride for axis in place.axes)
    if place.causal or shared < LISTED_ROWS or len(place.axes) == 1:
        return None
    return lambda batch: _groups(place, batch)


def _tile_lists(place: Place) -> KeySelection:
    """One list per query tile: its stride group's window, as slots."""
    assert place.tilings is not None
    q_tiling, k_tiling = place.tilings
    parts = []
    for a, (axis, offset) in enumerate(zip(place.axes, k_tiling.offsets(), strict=True)):
        first = torch.arange(q_tiling.counts[a]) * q_tiling.tile[a] * axis.dilation
        x = torch.arange(axis.dilation)[:, None] + first  # first query of every tile, (d, tiles)
        listed = pick(offset, axis.keys()[x.clamp(max=axis.length - 1)].flatten(0, 1))
        parts.append(torch.where(x.reshape(-1, 1) < axis.length, listed, -1))
    index = product_sum(parts)
    index = _tile_rows(index, q_tiling).sort(-1).values
    if place.extra:
        extra = k_tiling.length + torch.arange(place.extra)
        index = torch.cat([index, extra.expand(index.shape[0], -1)], -1)
    limit = None
    if q_tiling.length != q_tiling.tokens:  # padding queries see nothing
        limit = torch.zeros(1, place.q_len, dtype=torch.long)
        limit[0, slots_of(place, 0)] = place.kv_len
    return KeySelection(index[None, None], math.prod(q_tiling.tile), limit)


def _tile_rows(index: Tensor, tiling: Tiling) -> Tensor:
    """Rows numbered ``(g_0, tile_0, g_1, tile_1, …)`` reordered as tiles lie in the sequence: groups before tiles."""
    rank = len(tiling.grid)
    sizes = [n for pair in zip(tiling.dilation, tiling.counts, strict=True) for n in pair]
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    return index.unflatten(0, sizes).permute(*order, 2 * rank).flatten(0, 2 * rank - 1)


def _interval_lists(place: Place, rows: int) -> KeySelection:
    """One list per stride group of the first axis, where windows are intervals."""
    assert place.rest is not None
    start, _ = place.axes[0].spans()
    group = torch.arange(place.first, place.first + place.q_len, rows)
    begin = start[torch.div(group, place.rest, rounding_mode="floor").clamp(max=start.numel() - 1)] * place.rest
    index = begin[:, None] + torch.arange(place.keys)
    return KeySelection(torch.where(index < place.kv_len, index, -1)[None, None], rows)


def _groups(place: Place, batch: int) -> Groups:
    """One group per stride group of a row-major sequence; queries outside the grid are one more."""
    q_parts, k_parts = [], []
    for axis, offset in zip(place.axes, row_major(place.grid), strict=True):
        longest = axis.group_length(0)
        leaders = torch.arange(0, longest, axis.stride)
        x = torch.arange(axis.dilation)[:, None, None] + axis.dilation * (
            leaders[:, None] + torch.arange(axis.stride)
        )  # (d, stride groups, stride)
        q_parts.append(pick(offset, torch.where(x < axis.length, x, -1)).flatten(0, 1))
        head = x[..., 0].reshape(-1)
        keys = pick(offset, axis.keys()[head.clamp(max=axis.length - 1)])
        k_parts.append(torch.where((head < axis.length)[:, None], keys, -1))
    q, k = product_sum(q_parts), product_sum(k_parts)
    live = (q >= 0).any(-1)
    q, k = q[live], k[live]
    if place.extra:
        tokens = math.prod(place.grid)
        k = torch.cat([k, (tokens + torch.arange(place.extra)).expand(k.shape[0], -1)], -1)
    members, n_q = q[q >= 0], (q >= 0).sum(-1)
    seen, n_k = k.reshape(-1), torch.full_like(n_q, k.shape[1])
    if place.q_len > math.prod(place.grid):
        members = torch.cat([members, torch.arange(math.prod(place.grid), place.q_len)])
        seen = torch.cat([seen, torch.arange(place.kv_len)])
        n_q = torch.cat([n_q, torch.tensor([place.q_len - math.prod(place.grid)])])
        n_k = torch.cat([n_k, torch.tensor([place.kv_len])])
    b = torch.arange(batch)[:, None]

    def ends(counts: Tensor) -> Tensor:
        return torch.nn.functional.pad(counts.repeat(batch).cumsum(0), (1, 0))

    return Groups((members + b * place.q_len).reshape(-1), ends(n_q), (seen + b * place.kv_len).reshape(-1), ends(n_k))
