"""Which tiles ``gather`` computes for a ``BlockMask`` (or for no mask at all), as a plan for ``kernels.ragged``.

Tile rows with equally many whole and cut tiles run together, so that no row is padded to another's length. A tile is
*whole* when mask and model allow all of it, and is then never masked. What a cut tile hides is evaluated once per
distinct tile: the diagonal of a causal model is the same for every head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import noop_mask

from ..core.base_mask import FULL, PARTIAL, BaseMask, Predicate
from ..core.errors import ShapeError
from ..core.layouts import BlockMask, block_mask_kinds
from .call import AttentionCall, relative_index
from .prepared import prepared
from .rows import Batch, Buffers, Plan, split_keys, split_rows

DENSE_BLOCK = 128
TABLE_KEYS = 4096
"""Keys in cut tiles kept evaluated, per tile row of the call; beyond that they are evaluated batch by batch."""
PENALTIES = 1 << 22
"""Pairs of distinct cut tiles that are kept as float32 penalties; beyond that as bool, a quarter of the memory, slower to apply."""


@dataclass(frozen=True, eq=False)
class _Cut:
    """What one condition (the model's or the mask's) hides inside tiles.

    Attributes:
        mod: the condition.
        active: ``(B or 1, H or 1, nqb, nkb)`` bool, the tiles in which the condition decides.
        reads_head: whether it may depend on the query head.
        table: ``(T + 1, q_block, kv_block)`` of distinct tiles, −inf (float32) or True (bool) hides; one entry hides nothing. None
            when the tiles are too many to keep: they are evaluated batch by batch.
        slot: ``(B or 1, H or 1, nqb, nkb)`` int64 index into ``table``.
        nothing: the entry that hides nothing.
    """

    mod: Predicate
    active: Tensor
    reads_head: bool
    table: Tensor | None = None
    slot: Tensor | None = None
    nothing: Tensor | None = None


@dataclass(frozen=True, eq=False)
class _Tiles:
    """Everything about the tiles of one call that does not depend on q, k, v.

    Attributes:
        size: ``(q_block, kv_block)``.
        b, u: ``(T,)`` batch row and number of every tile row, sorted by (whole, cut).
        heads: ``(T, G)`` its query heads: more than one where those of a key head agree, so that a tile is gathered once for all.
        order: ``(T, nkb)`` int32 key tiles of these rows, whole ones first, then cut ones.
        runs: ``(whole, cut, start, end)`` of every group of rows.
        cuts: the conditions that cut tiles.
        q_rows: ``(T, G)`` int64 units of the flattened q. first: those of the first head, as numbers.
        slots: for every condition with a table, per run ``(rows, G or 1, cut tiles)`` entries of it; ``(1, …)`` where all rows agree.
    """

    size: tuple[int, int]
    b: Tensor
    u: Tensor
    heads: Tensor
    order: Tensor
    runs: list[tuple[int, int, int, int]]
    cuts: list[_Cut]
    q_rows: Tensor
    first: list[int]
    slots: list[list[Tensor]]


def block_size(call: AttentionCall, mask: BlockMask | None) -> tuple[int, int]:
    """Rows and keys per tile."""
    if mask is not None:
        return mask.BLOCK_SIZE
    q_len = call.base.q_len
    return (DENSE_BLOCK if q_len >= DENSE_BLOCK else 1 << max(q_len - 1, 0).bit_length(), DENSE_BLOCK)


def block_plan(call: AttentionCall, mask: BlockMask | None, budget: int) -> Plan:
    """The plan over q, k, v padded to whole tiles and flattened to rows; ``budget`` is in score elements per batch
    of tiles of few rows.

    Tiles are made once for a mask: layers that share it and backward do not repeat the work.
    """
    name = ("gather tiles", call.q.shape[0], call.q.shape[1], call.k.shape[1])
    tiles = prepared(call, mask, name, lambda: _tiles(call, mask))
    reads = sum((whole + cut) * (end - start) for whole, cut, start, end in tiles.runs) * tiles.size[1]
    covers = sum(end - start for *_, start, end in tiles.runs) == tiles.u.numel()
    at_once = _at_once(call, tiles.size[0], budget)
    return Plan(lambda: _batches(call, tiles, at_once), *tiles.size, key_reads=reads, covers=covers)


def _at_once(call: AttentionCall, rows: int, budget: int) -> int:
    """Score elements per batch: on CPU more where a tile has so many rows that it takes few keys and values for each score."""
    if call.q.device.type != "cpu":
        return budget
    beside = call.q.shape[-1] + call.v.shape[-1]
    return max(budget, min(3 * budget * rows // (rows + beside), 2 * budget))


def _tiles(call: AttentionCall, mask: BlockMask | None) -> _Tiles:
    base = call.base
    batch, heads, kv_heads, group = call.q.shape[0], call.q.shape[1], call.k.shape[1], call.groups
    q_block, kv_block = size = block_size(call, mask)
    allowed = base.block_map(q_block, kv_block)[:, None]
    kinds = allowed if mask is None else _mask_kinds(mask, base)
    joint = torch.minimum(kinds, allowed)
    past_end = torch.zeros_like(allowed[:1], dtype=torch.bool)
    if base.kv_len % kv_block:
        past_end[..., -1] = True  # keys past the end live in the last tile
        joint = joint.clamp(max=torch.where(past_end, PARTIAL, FULL).to(joint.dtype))
    nqb, nkb = joint.shape[2:]
    own = kinds.view(kinds.shape[0], kv_heads, group, nqb, nkb) if kinds.shape[1] > 1 else kinds[:, :, None]
    shared = group > 1 and (kinds.shape[1] == 1 or bool((own == own[:, :, :1]).all()))
    step = group if shared and kinds.shape[1] > 1 else 1
    of_rows = joint[:, ::step].expand(batch, kv_heads if shared else heads, nqb, nkb).reshape(-1, nkb)
    code = (of_rows == FULL).sum(-1) * (nkb + 1) + (of_rows == PARTIAL).sum(-1)
    rows = torch.argsort(code, stable=True)
    order = torch.argsort(of_rows[rows], dim=-1, descending=True, stable=True).to(torch.int32)
    values, counts = torch.unique_consecutive(code[rows], return_counts=True)
    runs, start = [], 0
    for value, count in torch.stack([values, counts], -1).tolist():
        if value:
            runs.append((*divmod(value, nkb + 1), start, start + count))
        start += count
    per_row = group if shared else 1
    line = torch.div(rows, nqb, rounding_mode="floor")
    u, b, h = rows % nqb, torch.div(line, heads // per_row, rounding_mode="floor"), line % (heads // per_row)
    own_heads = (h * per_row)[:, None] + torch.arange(per_row, device=rows.device)
    q_rows = ((b * heads)[:, None] + own_heads) * nqb + u[:, None]
    cuts = _cuts(call, mask, kinds, allowed, joint, past_end)
    tiles = _Tiles(size, b, u, own_heads, order, runs, cuts, q_rows, q_rows[:, 0].tolist(), [])
    for cut in tiles.cuts:
        slots = [_at(cut, tiles, cut.slot, run) for run in runs] if cut.slot is not None else []
        tiles.slots.append([x[:1] if bool((x == x[:1]).all()) else x for x in slots])
    return tiles


def _mask_kinds(mask: BlockMask, base: BaseMask) -> Tensor:
    if tuple(mask.seq_lengths) != (base.q_len, base.kv_len):
        raise ShapeError(
            f"the BlockMask was made for (q_len, kv_len) = {tuple(mask.seq_lengths)}; expected {(base.q_len, base.kv_len)}. "
            "Build it for these lengths, or pass a Pattern, which follows the length."
        )
    return block_mask_kinds(mask)


# --- what cut tiles hide -------------------------------------------------------------------------------------------


def _cuts(
    call: AttentionCall, mask: BlockMask | None, kinds: Tensor, allowed: Tensor, joint: Tensor, past_end: Tensor
) -> list[_Cut]:
    base, size = call.base, block_size(call, mask)
    out = []
    model = (allowed == PARTIAL) | past_end
    if bool(model.any()):
        reads_batch, reads_head = base.batch > 1, False
        if base.predicate is not None:
            also = reads(call, base.predicate)
            reads_batch, reads_head = reads_batch or also[0], also[1]
        intervals = base.predicate is None and base.valid is None
        out.append(_cut(call, base.mask_mod(), model, joint, size, reads_batch, reads_head, intervals))
    if mask is not None and mask.mask_mod is not noop_mask:
        own = kinds == PARTIAL  # whole tiles never ask the mask's own mask_mod
        if bool((own & (joint > 0)).any()):
            out.append(_cut(call, mask.mask_mod, own, joint, size, *reads(call, mask.mask_mod)))
    return out


def reads(call: AttentionCall, mod: Predicate) -> tuple[bool, bool]:
    """Whether a condition may depend on the batch row and on the head, from the shape of its answer for one pair."""
    batch, heads = call.q.shape[:2]
    b, h = (torch.arange(n, device=call.q.device) for n in (batch, heads))
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=call.q.device)
    shape = mod(b[:, None, None, None], h[None, :, None, None], zero, zero).shape
    return len(shape) == 4 and shape[0] > 1, len(shape) == 4 and shape[1] > 1


def _cut(
    call: AttentionCall,
    mod: Predicate,
    active: Tensor,
    joint: Tensor,
    size: tuple[int, int],
    reads_batch: bool,
    reads_head: bool,
    intervals: bool = False,
) -> _Cut:
    """Evaluate ``mod`` once per distinct tile in which it decides (``active``) and that is computed at all, unless these are too many.

    ``intervals``: it is the base mask's, and says no more than ``lo`` and ``hi``.
    """
    used = active & (joint == PARTIAL)
    used = used.expand(call.q.shape[0] if reads_batch else -1, call.q.shape[1] if reads_head else -1, -1, -1)
    used = used if reads_batch else used.any(0, keepdim=True)
    used = used if reads_head else used.any(1, keepdim=True)
    where = used.nonzero()
    total = where.shape[0]
    if total * size[1] > TABLE_KEYS * call.q.shape[0] * active.shape[2]:
        return _Cut(mod, active, reads_head)
    number = torch.full(used.shape, total, dtype=torch.int32, device=active.device)
    number[used] = torch.arange(total, dtype=torch.int32, device=active.device)
    if intervals:
        ends, same = _distinct(_ends(call.base, where, size))
        lo, hi = ends[..., None].unbind(1)
        k = torch.arange(size[1], device=active.device)
        table = (k < lo) | (k >= hi)
    else:
        table = torch.zeros(total + 1, *size, dtype=torch.bool, device=active.device)
        for part in torch.arange(total, device=active.device).split(max(1, (1 << 20) // (size[0] * size[1]))):
            b, h, u, t = (i[:, None, None] for i in where[part].unbind(-1))
            table[part] = _hidden(call.base, mod, b, h, u, t, size)
        table, same = _distinct(table)
    if table.numel() <= PENALTIES:
        table = torch.zeros(table.shape, device=table.device).masked_fill_(table, -torch.inf)
    return _Cut(mod, active, reads_head, table, same[torch.where(active, number, total)], same[total])


def _ends(base: BaseMask, where: Tensor, size: tuple[int, int]) -> Tensor:
    """``(T + 1, 2, q_block)`` int32: first and last key + 1 that each row sees in tiles ``(b, h, u, t)``; in the last one, every key."""
    b, _, u, t = where[..., None].unbind(1)
    q = (u * size[0] + torch.arange(size[0], device=u.device)).clamp(max=base.q_len - 1)
    row = b if base.lo.shape[0] > 1 else torch.zeros_like(b)
    ends = torch.stack([base.lo[row, q], base.hi[row, q].clamp(max=base.kv_len)], 1) - (t * size[1])[:, None]
    whole = torch.tensor([0, size[1]], device=u.device)[None, :, None].expand(1, 2, size[0])
    return torch.cat([ends.clamp(0, size[1]), whole]).to(torch.int32)


def _distinct(table: Tensor) -> tuple[Tensor, Tensor]:
    """``(T, …)`` without repeated entries, and the int64 entry of every former one."""
    flat = table.flatten(1)
    same = torch.arange(table.shape[0], device=table.device)
    if flat.shape[1] * flat.element_size() % 8:
        return table, same
    words = flat.view(torch.int64)
    weights = torch.randint(1 << 62, (words.shape[1],), generator=torch.Generator().manual_seed(0)).to(words.device) | 1
    _, entry = torch.unique(words.mul(weights).sum(1), return_inverse=True)
    first = torch.full((int(entry.max()) + 1,), table.shape[0], device=table.device).scatter_reduce(
        0, entry, same, "amin"
    )
    if bool((words[first[entry]] == words).all()):
        return table[first], entry
    return table, same  # two of them share a sum


def _hidden(
    base: BaseMask, mod: Predicate, b: Tensor, h: Tensor, u: Tensor, t: Tensor, size: tuple[int, int]
) -> Tensor:
    """Pairs that ``mod`` hides in tiles: index tensors ``(..., 1, 1)`` give ``(..., q_block, kv_block)``; keys past the end are hidden."""
    q = u * size[0] + torch.arange(size[0], device=u.device)[:, None]
    k = t * size[1] + torch.arange(size[1], device=u.device)
    hidden = ~mod(b, h, q.clamp(max=base.q_len - 1), k.clamp(max=base.kv_len - 1))
    if base.kv_len % size[1]:
        hidden = hidden | (k >= base.kv_len)
    return hidden.expand(torch.broadcast_shapes(hidden.shape, q.shape, k.shape))


def _at(cut: _Cut, tiles: _Tiles, of: Tensor, run: tuple[int, int, int, int]) -> Tensor:
    """What ``of`` ``(B or 1, H or 1, nqb, nkb)`` holds for the cut tiles of a run of rows, ``(rows, G or 1, cut tiles)``."""
    whole, count, start, end = run
    b, u, heads = tiles.b[start:end, None, None], tiles.u[start:end, None, None], tiles.heads[start:end, :, None]
    heads = heads if cut.reads_head else heads[:, :1]  # G > 1 only when all query heads of the row have the same tiles
    t = tiles.order[start:end, None, whole : whole + count]
    return of[
        b if of.shape[0] > 1 else torch.zeros_like(b), heads if of.shape[1] > 1 else torch.zeros_like(heads), u, t
    ]


def _hide(call: AttentionCall, tiles: _Tiles, run: int, part: slice, which: slice, buffers: Buffers) -> Tensor | None:
    """What is hidden in the cut tiles ``which`` of rows ``part`` of a run, ``(R or 1, G or 1, q_block, tiles, kv_block)``; until the next one."""
    hidden = None
    for number, (cut, slots) in enumerate(zip(tiles.cuts, tiles.slots, strict=True)):
        if cut.table is not None:
            entries = _entries(slots[run][..., which], part, tiles.size[0])
            room = buffers.get(f"hidden {number}", (entries.numel(), tiles.size[1]), cut.table.dtype)
            found = torch.index_select(cut.table.flatten(0, 1), 0, entries.flatten(), out=room)
            found = found.view(*entries.shape, tiles.size[1])
        else:
            whole, _, first, _ = tiles.runs[run]
            rows = slice(first + part.start, first + part.stop)
            order = tiles.order[rows, whole + which.start : whole + which.stop]
            heads = tiles.heads[rows, :, None, None, None]
            pairs = _hidden(
                call.base,
                cut.mod,
                tiles.b[rows, None, None, None, None],
                heads if cut.reads_head else heads[:, :1],
                tiles.u[rows, None, None, None, None],
                order[:, None, :, None, None],
                tiles.size,
            )
            active = _at(cut, tiles, cut.active, (whole + which.start, order.shape[1], rows.start, rows.stop))
            found = (pairs & active[..., None, None]).transpose(2, 3)
        hidden = found if hidden is None else _either(hidden, found)
    return hidden


def _entries(slots: Tensor, part: slice, q_block: int) -> Tensor:
    """``(R or 1, G or 1, q_block, tiles)``: the rows of the flattened table that the tiles ``slots`` of rows ``part`` are made of."""
    where = slots if slots.shape[0] == 1 else slots[part]
    return where[:, :, None] * q_block + torch.arange(q_block, device=where.device)[:, None]


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Hidden by one or the other; each bool (True hides) or penalties (−inf hides)."""
    if a.dtype == b.dtype and a.dtype != torch.bool:
        return a + b
    return (a != 0) | (b != 0)


# --- batches -------------------------------------------------------------------------------------------------------


def _batches(call: AttentionCall, tiles: _Tiles, budget: int) -> Iterator[Batch]:
    device = call.q.device
    q_block, kv_block = tiles.size
    kv_heads, per_row, nkb = call.k.shape[1], tiles.heads.shape[1], tiles.order.shape[1]
    k_first = (tiles.b * kv_heads + torch.div(tiles.heads[:, 0], call.groups, rounding_mode="floor")) * nkb
    buffers = Buffers(device)  # one copy of what is hidden, written anew when it changes
    for run, (whole, cut, start, end) in enumerate(tiles.runs):
        count = whole + cut
        k_rows = k_first[start:end, None] + tiles.order[start:end, :count]
        alike = not cut or _alike(tiles, run)
        own = None if alike else _own_start(tiles, run)
        hidden = _hide(call, tiles, run, slice(0, end - start), slice(0, cut), buffers) if cut and alike else None
        columns = split_keys(count, kv_block, device)
        for part in split_rows(end - start, per_row * q_block * columns[0].stop * kv_block, budget):
            at = slice(start + part.start, start + part.stop)
            first, last = tiles.first[at.start], tiles.first[at.stop - 1] + 1
            together = per_row == 1 and last - first == at.stop - at.start  # rows of a run are in ascending order
            for some in columns:
                which = slice(max(some.start - whole, 0), some.stop - whole)  # of the cut ones
                begin = hide = bias = None
                if which.stop > 0 and own is not None:
                    entries = _entries(own[1][..., some], part, q_block).expand(-1, per_row, -1, -1)
                    begin = own[0], entries.reshape(entries.shape[0], -1, entries.shape[3])
                elif which.stop > 0:
                    mask = _hide(call, tiles, run, part, which, buffers) if hidden is None else hidden[..., which, :]
                    hide = None if mask is None else (max(whole - some.start, 0) * kv_block, mask)
                if call.bias is not None:
                    bias = _bias_columns(call, tiles, at, some)
                yield Batch(
                    tiles.q_rows[at],
                    k_rows[part, some],
                    hide,
                    bias,
                    begin,
                    slice(first, last) if together else None,
                    some.start == 0,
                    some.stop == count,
                )


def _bias_columns(call: AttentionCall, tiles: _Tiles, rows: slice, columns: slice) -> Tensor:
    """``(R, M, L)``: where the biases of tile rows ``rows`` and their tiles ``columns`` are in the flattened table."""
    assert call.bias is not None
    (q_block, kv_block), index = tiles.size, tiles.order[rows, columns]
    q = tiles.u[rows, None, None, None, None] * q_block + torch.arange(q_block, device=index.device)[:, None, None]
    k = (index[:, :, None] * kv_block + torch.arange(kv_block, device=index.device))[:, None, None]
    column = relative_index(call, q, k) + tiles.heads[rows, :, None, None, None] * call.bias.shape[1]
    return column.reshape(index.shape[0], tiles.heads.shape[1] * q_block, -1)


def _alike(tiles: _Tiles, run: int) -> bool:
    """Whether the same pairs are hidden in all rows of a run."""
    return all(
        cut.table is not None and slots[run].shape[0] == 1 for cut, slots in zip(tiles.cuts, tiles.slots, strict=True)
    )


def _own_start(tiles: _Tiles, run: int) -> tuple[Tensor, Tensor] | None:
    """``(rows of the table, (rows, G or 1, tiles) entries of it)`` for a run of which each row hides pairs of its own.

    None where it takes less to mask the cut tiles after the product: many whole tiles, several conditions, masks that are bool.
    """
    whole, cut, _, _ = tiles.runs[run]
    if len(tiles.cuts) != 1 or cut < whole:
        return None
    (condition,), (slots,) = tiles.cuts, tiles.slots
    if condition.table is None or condition.nothing is None or condition.table.dtype == torch.bool:
        return None
    nothing = condition.nothing.expand(*slots[run].shape[:2], whole)
    return condition.table.flatten(0, 1), torch.cat([nothing, slots[run]], -1)
