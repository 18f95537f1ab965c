"""Layouts of a neighborhood, from the closed forms of its axes; no pair of tokens is evaluated.

A window is a product over axes, so whether two tiles meet, and whether every pair in them is visible, is a product over axes too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.base_mask import EMPTY, FULL, PARTIAL, BaseMask, Predicate
from ..core.errors import UnsupportedError
from ..core.grid import Axis
from ..core.layouts import Groups, KeySelection, Layout, block_mask
from ..core.tiles import Tiling, pick, product_sum, row_major

BLOCK = 128
LISTS_PAY = 1.25
"""Lists are taken where tiles would compute this many times their pairs; gathering single rows is a little slower than tiles."""
LISTED_ROWS = 8
"""Queries that must share a list before lists are considered."""


@dataclass(frozen=True)
class Place:
    """A neighborhood in one call.

    Attributes:
        axes: of the grid. tilings: orders of queries and keys; None is row-major.
        q_len, kv_len: of the call. first: token number of query row 0. causal: whether the host is.
        extra: keys after the grid. layout: the pattern's wish.
    """

    axes: tuple[Axis, ...]
    tilings: tuple[Tiling, Tiling] | None
    q_len: int
    kv_len: int
    first: int
    causal: bool
    extra: int
    layout: Literal["auto", "blocks", "lists"]

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @property
    def keys(self) -> int:
        """Keys of a window."""
        return math.prod(axis.window for axis in self.axes)

    @property
    def dense(self) -> bool:
        """Every real pair that the host allows is visible, and no slot is padding."""
        if self.tilings and any(t.length != t.tokens for t in self.tilings):
            return False
        one = self.axes[0]
        plain_causal = len(self.axes) == 1 and self.causal and not self.extra and one.window == one.length
        return plain_causal or all(axis.whole for axis in self.axes)

    @property
    def rest(self) -> int | None:
        """Tokens of all axes but the first when these are seen whole and the first is not dilated: windows are then intervals."""
        plain = self.axes[0].dilation == 1 and all(axis.whole for axis in self.axes[1:])
        return math.prod(self.grid[1:]) if plain and self.tilings is None else None


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
    size, kinds = _kinds(place)
    if lists is not None and device.type != "cuda":
        computed = int((kinds > EMPTY).sum()) * size[0] * size[1]
        if computed > LISTS_PAY * place.q_len * (place.keys + place.extra):
            return _moved(lists(batch), device)
    mod = None if not bool((kinds == PARTIAL).any()) else _mask_mod(place, device)
    return block_mask(kinds.to(device)[None, None], size, (place.q_len, place.kv_len), mod)


def _moved(layout: Layout, device: torch.device) -> Layout:
    if isinstance(layout, KeySelection):
        limit = None if layout.limit is None else layout.limit.to(device)
        return KeySelection(layout.index.to(device), layout.block_size, limit)
    assert isinstance(layout, Groups)
    q_index, cu_q, k_index, cu_k = (t.to(device) for t in (layout.q_index, layout.cu_q, layout.k_index, layout.cu_k))
    return Groups(q_index, cu_q, k_index, cu_k)


# --- slots ---------------------------------------------------------------------------------------------------------


def _offsets(place: Place, which: int) -> list[Tensor]:
    return row_major(place.grid) if place.tilings is None else place.tilings[which].offsets()


def _slots(place: Place, which: int) -> Tensor:
    """``(tokens,)``: where the row-major tokens of the grid are among the queries (0) or keys (1), before any is cut off."""
    return product_sum([offset[:, None] for offset in _offsets(place, which)])[:, 0]


def _per_slot(place: Place, which: int, values: list[Tensor], fill: int) -> list[Tensor]:
    """Per axis values of coordinates, spread over all slots of the call; slots that are no grid token get ``fill``."""
    slots, found = _slots(place, which), []
    length = place.q_len if which == 0 else place.kv_len
    shift = place.first if which == 0 else 0
    size = max(int(slots[-1]) + 1, int(slots.max()) + 1, shift + length)
    for a, value in enumerate(values):
        shape = [1] * len(values)
        shape[a] = -1
        out = torch.full((size,), fill)
        out[slots] = value.view(shape).expand(place.grid).reshape(-1)
        found.append(out[shift : shift + length].clone())
    return found


def _extra_slots(place: Place) -> tuple[Tensor, Tensor]:
    """``(q_len,)`` and ``(kv_len,)`` bool: slots outside the grid that see, or are seen by, everything."""
    tokens = (math.prod(place.grid),) * 2 if place.tilings is None else tuple(t.length for t in place.tilings)
    q, k = torch.arange(place.q_len) + place.first, torch.arange(place.kv_len)
    if not place.extra:
        return torch.zeros_like(q, dtype=torch.bool), torch.zeros_like(k, dtype=torch.bool)
    return q >= tokens[0], (k >= tokens[1]) & (k < tokens[1] + place.extra)


def _mask_mod(place: Place, device: torch.device) -> Predicate:
    codes = [axis.codes() for axis in place.axes]
    low = [x.to(device) for x in _per_slot(place, 0, [c[1] for c in codes], 0)]
    high = [x.to(device) for x in _per_slot(place, 0, [c[2] for c in codes], 0)]
    at = [x.to(device) for x in _per_slot(place, 1, [c[0] for c in codes], -1)]
    if not place.extra:

        def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            kept = (at[0][k] >= low[0][q]) & (at[0][k] < high[0][q])
            for a in range(1, len(at)):
                kept = kept & (at[a][k] >= low[a][q]) & (at[a][k] < high[a][q])
            return kept

        return inside
    q_extra, k_extra = (x.to(device) for x in _extra_slots(place))
    q_real, k_real = (high[0] > low[0]) | q_extra, (at[0] >= 0) | k_extra

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        near = (at[0][k] >= low[0][q]) & (at[0][k] < high[0][q])
        for a in range(1, len(at)):
            near = near & (at[a][k] >= low[a][q]) & (at[a][k] < high[a][q])
        return near | (k_extra[k] & q_real[q]) | (q_extra[q] & k_real[k])

    return kept


# --- tiles ---------------------------------------------------------------------------------------------------------


def _kinds(place: Place) -> tuple[tuple[int, int], Tensor]:
    """``(q_block, kv_block)`` and ``(q tiles, key tiles)`` int8 kinds."""
    if place.tilings is not None:
        size = math.prod(place.tilings[0].tile), math.prod(place.tilings[1].tile)
        kinds = _tile_kinds(place)
    else:
        size = BLOCK, BLOCK
        kinds = _row_kinds(place)
    shape = [-(-n // t) for n, t in zip((place.q_len, place.kv_len), size, strict=True)]
    grown = torch.full(shape, EMPTY, dtype=torch.int8)
    kinds = kinds[: shape[0], : shape[1]]
    grown[: kinds.shape[0], : kinds.shape[1]] = kinds
    return size, _with_extra(place, grown, size) if place.extra else grown


def _tile_kinds(place: Place) -> Tensor:
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


def _row_kinds(place: Place) -> Tensor:
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
    _, segment, _ = torch.unique_consecutive(torch.stack([block, line]), dim=1, return_inverse=True, return_counts=True)
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
    q_extra, k_extra = _extra_slots(place)
    q_real = (_per_slot(place, 0, [c[2] for c in codes], 0)[0] > 0) | q_extra
    k_real = (_per_slot(place, 1, [c[0] for c in codes], -1)[0] >= 0) | k_extra

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


# --- exact keys ----------------------------------------------------------------------------------------------------


def _one_query(place: Place) -> KeySelection:
    parts, at = [], place.first
    for axis, offset, step in zip(place.axes, _offsets(place, 1), row_major(place.grid), strict=True):
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
        limit[0, _slots(place, 0)] = place.kv_len
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
