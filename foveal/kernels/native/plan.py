"""What is visible, as the kernels want it: an interval of keys per row, padding, kinds of tiles, and bits inside tiles.

Intervals carry causality, windows, chunks and documents, so these need no bits at all. Only a condition that nobody can
see into (a ``mask_mod``, a host's own predicate) is evaluated, once per tile in which it decides, and equal tiles are
stored once.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import noop_mask

from ...core.base_mask import EMPTY, PARTIAL, BaseMask, Predicate
from ...core.errors import ShapeError
from ...core.layouts import BlockMask, Groups, KeySelection
from ..block_plan import reads
from ..call import AttentionCall
from ..prepared import prepared

BLOCK = 128
CPU = torch.device("cpu")
"""Where everything here lies, whatever device a caller made the default."""
ONE, SOFTMAX, APART, EVERY = 0, 1, 2, 3
"""A row in several groups cannot be, has one softmax over all of them, has an output for each; every row is in one, with keys."""
CHUNK = 1 << 20
"""Pairs of a condition that are evaluated at once: few enough that what they become on the way stays in a cache."""
GATHER = 0x0102040810204080


@dataclass(frozen=True, eq=False)
class Visible:
    """Arguments of the kernels.

    Attributes:
        lo, hi: ``(B or 1, Nq)`` int64; row ``i`` may see keys ``lo[i] <= k < hi[i]``.
        valid: ``(B or 1, Nk)`` bool, or None.
        kinds: ``(B or 1, H or 1, q tiles, kv tiles)`` int8, 0 drops a tile; None keeps all.
        slot: like ``kinds``, int32: row of ``table`` that cuts the tile further, −1 for none.
        table: ``(T, q_tile, words)`` int64: bit ``k`` of row ``q`` says whether the pair is visible.
        index: ``(B or 1, 1 or Hkv or H, blocks, K)`` int64 key positions, below 0 for none; or None.
        tile: rows and keys per tile; rows per list of ``index``.
        members: ``Groups`` as one int64 tensor: rows of all groups, their bounds, keys, their bounds, batch row of each
            group, key head of each group; or None.
        counts: groups, rows and keys in all of them, whether rows count on over the heads, and how a row's groups are
            combined (``ONE``, ``SOFTMAX``, ``APART``, ``EVERY``); empty without groups.
    """

    lo: Tensor
    hi: Tensor
    valid: Tensor | None
    kinds: Tensor | None = None
    slot: Tensor | None = None
    table: Tensor | None = None
    index: Tensor | None = None
    tile: tuple[int, int] = (0, 0)
    members: Tensor | None = None
    counts: tuple[int, ...] = ()


def visible(call: AttentionCall) -> Visible:
    """The arguments for a call, made once for a mask."""
    base, mask = call.base, call.layout
    if isinstance(mask, KeySelection):
        return _listed(base, mask)
    if isinstance(mask, Groups):
        return _grouped(call, mask)
    assert mask is None or isinstance(mask, BlockMask)
    name = ("native", call.q.shape[0], call.q.shape[1])
    return prepared(call, mask, name, lambda: _visible(call, base, mask))


def _listed(base: BaseMask, lists: KeySelection) -> Visible:
    hi = base.hi if lists.limit is None else torch.minimum(base.hi, lists.limit)
    lo = base.lo.expand(hi.shape[0], -1)
    valid = None if base.valid is None else base.valid.contiguous()
    return Visible(lo.contiguous(), hi.contiguous(), valid, index=lists.index.contiguous(), tile=(lists.block_size, 0))


def _grouped(call: AttentionCall, groups: Groups) -> Visible:
    heads, q_len = call.q.shape[1:3]
    kv_heads, kv_len = call.k.shape[1:3]
    known = _members.setdefault(groups, {})
    sizes = (call.q.shape[0], heads, kv_heads, q_len, kv_len)
    if sizes not in known:
        known[sizes] = _member_tensor(groups, *sizes)
    members, counts = known[sizes]
    base = call.base
    lo, hi = (x.contiguous() for x in torch.broadcast_tensors(base.lo, base.hi))
    return Visible(lo, hi, None if base.valid is None else base.valid.contiguous(), members=members, counts=counts)


_members: weakref.WeakKeyDictionary[Groups, dict[tuple[int, ...], tuple[Tensor, tuple[int, ...]]]] = (
    weakref.WeakKeyDictionary()
)
"""The kernels' form of a layout, for as long as the layout lives."""


def _member_tensor(
    groups: Groups, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int
) -> tuple[Tensor, tuple[int, ...]]:
    sizes = groups.cu_q.numel() - 1, groups.q_index.numel(), groups.k_index.numel()
    often = int(groups.q_index.bincount().max()) > 1 if groups.q_index.numel() else False
    per_row = q_len * heads if groups.per_head else q_len
    keyless = bool(((groups.cu_q.diff() > 0) & (groups.cu_k.diff() == 0)).any())
    alone = EVERY if sizes[1] == batch * per_row and not keyless else ONE
    combine = (SOFTMAX if groups.combine == "softmax" else APART) if often else alone
    # batch row, or key head of all batch rows, of a group with rows
    owner = torch.zeros(sizes[0], dtype=torch.int64, device=CPU)
    some = groups.cu_q.diff() > 0
    owner[some] = torch.div(groups.q_index[groups.cu_q[:-1][some]], q_len, rounding_mode="floor")
    if groups.per_head:
        owner = torch.div(owner, heads // kv_heads, rounding_mode="floor")
    batch_of = torch.div(owner, kv_heads, rounding_mode="floor") if groups.per_head else owner
    kv_of = owner % kv_heads if groups.per_head else torch.zeros_like(owner)
    parts = groups.q_index % per_row, groups.cu_q, groups.k_index % kv_len, groups.cu_k, batch_of, kv_of
    return torch.cat([x.to(torch.int64) for x in parts]), (*sizes, int(groups.per_head), combine)


def _visible(call: AttentionCall, base: BaseMask, mask: BlockMask | None) -> Visible:
    size = max(base.lo.shape[0], base.hi.shape[0])
    lo, hi = (x.expand(size, -1).contiguous() for x in (base.lo, base.hi))
    bounds = lo, hi, None if base.valid is None else base.valid.contiguous()
    if mask is None and base.predicate is None:
        return Visible(*bounds)
    tile = (BLOCK, BLOCK) if mask is None else mask.BLOCK_SIZE
    kinds = base.block_map(*tile)[:, None] if mask is None else tile_kinds(mask, base)
    allowed = None
    if base.predicate is not None:
        allowed = base.block_map(*tile)[:, None]
        kinds = torch.where(allowed == EMPTY, torch.zeros_like(kinds), kinds)
    mod = None if mask is None or mask.mask_mod is noop_mask else mask.mask_mod
    conditions: list[tuple[Predicate, Tensor]] = []
    if mod is not None:
        conditions.append((mod, kinds == PARTIAL))
    if base.predicate is not None and allowed is not None:
        conditions.append((base.predicate, (allowed == PARTIAL) & (kinds != EMPTY)))
    conditions = [(condition, where) for condition, where in conditions if bool(where.any())]
    slot, table = _bits(call, conditions, tile) if conditions else (None, None)
    return Visible(*bounds, kinds.contiguous(), slot, table, tile=tile)


@torch.compiler.disable  # reads what the lists hold
def tile_kinds(mask: BlockMask, base: BaseMask) -> Tensor:
    """``(B, H, q tiles, kv tiles)`` int8 kinds of a mask's tiles; as ``block_mask_kinds``, in one pass that checks them.

    Raises:
        ShapeError: a mask for other lengths, or lists that name a tile which does not exist.
    """
    from . import _native

    if tuple(mask.seq_lengths) != (base.q_len, base.kv_len):
        raise ShapeError(
            f"the BlockMask was made for (q_len, kv_len) = {tuple(mask.seq_lengths)}; expected {(base.q_len, base.kv_len)}. "
            "Build it for these lengths, or pass a Pattern, which follows the length."
        )
    rows, tiles = -(-base.q_len // mask.BLOCK_SIZE[0]), -(-base.kv_len // mask.BLOCK_SIZE[1])
    batch, heads, listed = mask.kv_num_blocks.shape
    lists: list[tuple[Tensor, Tensor]] = []
    for name, count, index in _lists_of(mask):
        if count.shape != (batch, heads, listed) or index.shape[:-1] != count.shape or listed < rows:
            raise ShapeError(
                f"the BlockMask's {name}_num_blocks has shape {tuple(count.shape)} and {name}_indices {tuple(index.shape)}; "
                f"expected ({batch}, {heads}, {rows}) and ({batch}, {heads}, {rows}, tiles)."
            )
        lists.append((count.to(torch.int32).contiguous(), index.to(torch.int32).contiguous()))
    kinds = torch.empty(batch, heads, rows, tiles, dtype=torch.int8, device=CPU)
    places = [(count.data_ptr(), index.data_ptr(), index.shape[-1]) for count, index in lists]
    whole = places[1] if len(places) > 1 else (0, 0, 0)
    if not _native.tile_kinds(places[0], whole, batch * heads, listed, rows, tiles, kinds.data_ptr()):
        _refuse(mask, base.kv_len, tiles)
    return kinds


def _lists_of(mask: BlockMask) -> list[tuple[str, Tensor, Tensor]]:
    """Name, counts and indices of the lists that a mask has."""
    found = [("kv", mask.kv_num_blocks, mask.kv_indices)]
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        found.append(("full_kv", mask.full_kv_num_blocks, mask.full_kv_indices))
    return found


def _refuse(mask: BlockMask, kv_len: int, tiles: int) -> None:
    """Say which list is wrong."""
    for name, count, index in _lists_of(mask):
        width = index.shape[-1]
        if int(count.min()) < 0 or int(count.max()) > width:
            raise ShapeError(
                f"the BlockMask's {name}_num_blocks spans {int(count.min())}…{int(count.max())}; expected 0…{width}, "
                f"the width of {name}_indices."
            )
        used = index[torch.arange(width, device=CPU) < count[..., None]]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= tiles):
            raise ShapeError(
                f"the BlockMask's {name}_indices names tiles {int(used.min())}…{int(used.max())}; expected 0…{tiles - 1} "
                f"because {kv_len} keys make {tiles} tiles of {mask.BLOCK_SIZE[1]}."
            )


# --- bits inside tiles ---------------------------------------------------------------------------------------------


def _bits(
    call: AttentionCall, conditions: list[tuple[Predicate, Tensor]], tile: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """``slot`` and ``table`` of all tiles in which a condition decides."""
    batch, heads = call.q.shape[:2]
    of_batch, of_head = (any(answer) for answer in zip(*(reads(call, mod) for mod, _ in conditions), strict=True))
    where = [w.expand(batch if of_batch else -1, heads if of_head else -1, -1, -1) for _, w in conditions]
    used = where[0] if len(where) == 1 else where[0] | where[1]
    at = used.nonzero()
    tables, slots = [], torch.empty(at.shape[0], dtype=torch.int64, device=CPU)
    count = 0
    for part in torch.arange(at.shape[0], device=CPU).split(max(1, CHUNK // (tile[0] * tile[1]))):
        kept = _evaluate(call.base, conditions, where, at[part], tile)
        distinct, which = _distinct(_pack(kept))
        tables.append(distinct)
        slots[part] = which + count
        count += distinct.shape[0]
    table = torch.cat(tables)
    if len(tables) > 1:
        table, which = _distinct(table)
        slots = which[slots]
    slot = torch.full(used.shape, -1, dtype=torch.int32, device=CPU)
    slot[used] = slots.to(torch.int32)
    return slot, table


def _evaluate(
    base: BaseMask, conditions: list[tuple[Predicate, Tensor]], where: list[Tensor], at: Tensor, tile: tuple[int, int]
) -> Tensor:
    """``(tiles, q_tile, kv_tile)`` bool of the tiles ``at`` ``(tiles, 4)``."""
    b, h, u, t = (i[:, None, None] for i in at.unbind(-1))
    q = (u * tile[0] + torch.arange(tile[0], device=CPU)[:, None]).clamp(max=base.q_len - 1)
    k = (t * tile[1] + torch.arange(tile[1], device=CPU)).clamp(max=base.kv_len - 1)
    kept = torch.ones(at.shape[0], *tile, dtype=torch.bool, device=CPU)
    for (condition, _), active in zip(conditions, where, strict=True):
        # a condition's own dimensions may be 1 where another one's are not
        row, head = b.clamp(max=active.shape[0] - 1), h.clamp(max=active.shape[1] - 1)
        kept &= condition(b, h, q, k) | ~active[row, head, u, t]
    return kept


def _pack(kept: Tensor) -> Tensor:
    """Bools ``(T, rows, keys)`` as int64 words ``(T, rows, ceil(keys / 64))``; key 0 is the lowest bit."""
    kept = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 64))
    eight = kept.view(torch.int64) * GATHER >> 56  # the product's highest byte has a bit from each of eight bytes
    return eight.to(torch.uint8).view(torch.int64)


def _distinct(table: Tensor) -> tuple[Tensor, Tensor]:
    """The different tiles of ``table`` and, for each tile, which one it is."""
    flat = table.view(table.shape[0], -1)
    factor = (
        torch.randint(-(1 << 62), 1 << 62, (flat.shape[1],), generator=torch.Generator().manual_seed(0), device=CPU) | 1
    )
    _, which = torch.unique((flat * factor).sum(-1), return_inverse=True)
    first = torch.full((int(which.max()) + 1,), flat.shape[0], device=CPU).scatter_reduce(
        0, which, torch.arange(flat.shape[0], device=CPU), "amin"
    )
    if not torch.equal(flat[first][which], flat):  # two different tiles have the same sum
        return table, torch.arange(flat.shape[0], device=CPU)
    return table[first], which
