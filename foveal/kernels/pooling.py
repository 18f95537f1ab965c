"""Arithmetic of pooled blocks: how many pairs a tile holds, block sums that grow with the cache, and filling a budget.

Shared by the patterns that score blocks by mean queries and mean keys. A *tile* is one block of query rows against one
block of keys; blocks are counted from key index 0 and from the first row of the call. Padding takes part in nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import FULL, PARTIAL, BaseMask
from ..core.errors import ShapeError
from .call import compute_dtype


def full_precision(x: Tensor) -> torch.autocast:
    """Context in which scores keep float32 (float64) even under autocast, so that a choice does not depend on it."""
    return torch.autocast(x.device.type, enabled=False)


def filled_keys(base: BaseMask) -> int:
    """Keys that hold something: below ``kv_len`` when a static cache is longer than what was written so far."""
    if not base.causal:
        return base.kv_len
    return max(0, min(base.kv_len, base.shift + base.q_len))


def keys_before(base: BaseMask) -> Tensor:
    """``(B or 1, kv_len + 1)`` int64: number of real keys before each index."""
    if "keys_before" not in base.cache:
        real = torch.ones(1, base.kv_len, dtype=torch.bool, device=base.device) if base.valid is None else base.valid
        base.cache["keys_before"] = pad(real.long().cumsum(-1), (1, 0))
    return base.cache["keys_before"]


def real_rows(base: BaseMask) -> Tensor:
    """``(B or 1, q_len)`` bool: rows that are no padding (a row is padding when its own key is)."""
    if "real_rows" not in base.cache:
        own = torch.arange(base.q_len, device=base.device) + base.shift
        cross = not base.causal and base.q_len != base.kv_len
        if base.valid is None or cross:
            real = torch.ones(1, base.q_len, dtype=torch.bool, device=base.device)
        else:
            real = base.valid[:, own.clamp(0, base.kv_len - 1)] & (own >= 0) & (own < base.kv_len)
        base.cache["real_rows"] = real
    return base.cache["real_rows"]


def tile_area(base: BaseMask, q_block: int, kv_block: int) -> Tensor:
    """``(B or 1, nqb, nkb)`` int64: allowed pairs per tile, exact; only cut tiles are looked into."""
    memo = ("tile_area", q_block, kv_block)
    if memo in base.cache:
        return base.cache[memo]
    kinds = base.block_map(q_block, kv_block)
    nqb, nkb = kinds.shape[1:]
    rows = (base.q_len - torch.arange(nqb, device=base.device) * q_block).clamp(max=q_block)
    edge = (torch.arange(nkb + 1, device=base.device) * kv_block).clamp(max=base.kv_len)
    before = keys_before(base)
    count = before[:, edge[1:]] - before[:, edge[:-1]]
    area = (kinds == FULL) * rows[:, None] * count[:, None, :]
    area = area.expand(kinds.shape).contiguous()
    b, u, c = (kinds == PARTIAL).nonzero(as_tuple=True)
    q_in, k_in = torch.arange(q_block, device=base.device), torch.arange(kv_block, device=base.device)
    per_tile = q_block * (kv_block if base.predicate is not None else 1)
    for part in torch.arange(b.numel(), device=base.device).split(max(1, (1 << 22) // per_tile)):
        bp, q = b[part, None], u[part, None] * q_block + q_in
        if base.predicate is not None:
            k = c[part, None] * kv_block + k_in
            ok = base.allowed(bp[..., None], torch.zeros_like(bp)[..., None], q[:, :, None], k[:, None, :])
            pairs = ok.sum((1, 2))
        else:
            inside, q = q < base.q_len, q.clamp(max=base.q_len - 1)
            row = bp if base.lo.shape[0] > 1 else torch.zeros_like(bp)
            start, end = edge[c[part], None], edge[c[part] + 1, None]
            lo, hi = base.lo[row, q].clamp(start, end), base.hi[row, q].clamp(start, end)
            of = bp if before.shape[0] > 1 else torch.zeros_like(bp)
            pairs = ((before[of, hi] - before[of, lo]).clamp(min=0) * inside).sum(-1)
        area[b[part], u[part], c[part]] = pairs
    base.cache[memo] = area
    return area


def diagonal_tiles(base: BaseMask, q_block: int, kv_block: int, local: int = 0) -> Tensor:
    """``(nqb, nkb)`` bool: key blocks that overlap the query block or the ``local − 1`` keys before it."""
    nqb, nkb = -(-base.q_len // q_block), -(-base.kv_len // kv_block)
    first = torch.arange(nqb, device=base.device) * q_block + base.shift
    last = (first + q_block).clamp(max=base.shift + base.q_len) - 1
    start = torch.arange(nkb, device=base.device) * kv_block
    return (start + kv_block > first[:, None] - max(local - 1, 0)) & (start <= last[:, None])


def sink_tiles(base: BaseMask, kv_block: int, sinks: int) -> Tensor:
    """``(B or 1, nkb)`` bool: key blocks that hold one of the first ``sinks`` tokens of a sequence."""
    hit = (base.rank >= 0) & (base.rank < sinks)
    if base.valid is not None:
        hit = hit & base.valid
    return pad(hit, (0, -base.kv_len % kv_block)).unflatten(-1, (-1, kv_block)).any(-1)


def block_sums(x: Tensor, block: int, keep: Tensor | None = None) -> Tensor:
    """Sums over consecutive blocks of rows: ``(B, H, N, D)`` → ``(B, H, ceil(N/block), D)``; ``keep`` is ``(B or 1, N)`` bool."""
    x = x.to(compute_dtype(x.dtype))
    if keep is not None:
        x = torch.where(keep[:, None, :, None], x, 0.0)
    return pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block)).sum(3)


def block_counts(keep: Tensor, block: int) -> Tensor:
    """``(B or 1, ceil(N/block))`` int64: kept rows per block of a ``(B or 1, N)`` bool."""
    return pad(keep.long(), (0, -keep.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def mean_rows(x: Tensor, block: int, keep: Tensor) -> Tensor:
    """Means over blocks of the rows that ``keep`` ``(B or 1, N)`` names; zero where a block has none."""
    count = block_counts(keep, block).clamp(min=1)
    return block_sums(x, block, None if bool(keep.all()) else keep) / count[:, None, :, None]


def check_same_keys(name: str, heads: int, channels: int, k: Tensor) -> None:
    """Raise unless a state that was made from keys ``(B, heads, N, channels)`` may go on with ``k`` ``(B, Hkv, Nk, D)``.

    A state of another length, batch or block size is rebuilt from ``k``: caches are cropped and reordered. This one is of another model.

    Raises:
        ShapeError: the numbers differ.
    """
    if (heads, channels) != (k.shape[1], k.shape[3]):
        raise ShapeError(
            f"{name}: state is of keys with {heads} heads of {channels} channels; expected {k.shape[1]} heads of {k.shape[3]}, those of "
            "this call, or None. Keep one state per model, request and layer."
        )


@dataclass(frozen=True, eq=False)
class BlockSums:
    """Running sums of key blocks, the state of a request; never changed in place.

    Attributes:
        sums: ``(B, Hkv, nb, D)`` float32 (float64 for float64 keys).
        counts: ``(B or 1, nb)`` int64 real keys per block.
        absorbed: keys summed so far.
        origin: rank of key 0 in each sequence; it moves when a rolling cache drops keys, and the sums are then rebuilt.
        block: keys per block.
    """

    sums: Tensor
    counts: Tensor
    absorbed: int
    origin: tuple[int, ...]
    block: int

    @property
    def means(self) -> Tensor:
        """``(B, Hkv, nb, D)``; zero for blocks without a real key."""
        return self.sums / self.counts.clamp(min=1)[:, None, :, None]


def absorb(state: object, k: Tensor, base: BaseMask, block: int) -> BlockSums:
    """Block sums of all keys written so far, from the new keys alone when ``state`` holds exactly the older ones.

    Raises:
        ShapeError: the state is of another model's keys.
    """
    filled = filled_keys(base)
    origin = tuple(base.rank[:, 0].tolist()) if base.kv_len else ()
    old = state if isinstance(state, BlockSums) else None
    if old is not None:
        check_same_keys("block_topk", old.sums.shape[1], old.sums.shape[3], k)
    fits = (
        old is not None
        and (old.block, old.origin) == (block, origin)
        and base.causal
        and old.absorbed == filled - base.q_len
        and old.sums.shape[0] == k.shape[0]
    )
    keep = torch.ones(1, base.kv_len, dtype=torch.bool, device=k.device) if base.valid is None else base.valid
    if old is None or not fits:
        some = keep[:, :filled]
        sums = block_sums(k[:, :, :filled], block, None if base.valid is None else some)
        return BlockSums(sums, block_counts(some, block), filled, origin, block)
    first = old.absorbed // block * block  # blocks from here on change
    lead = old.absorbed - first
    new, some = k[:, :, old.absorbed : filled], keep[:, old.absorbed : filled]
    fresh = block_sums(pad(new, (0, 0, lead, 0)), block, pad(some, (lead, 0)))
    grown = block_counts(pad(some, (lead, 0)), block)
    at = first // block
    extra = at + fresh.shape[2] - old.sums.shape[2]
    sums, counts = pad(old.sums, (0, 0, 0, max(extra, 0))), pad(old.counts, (0, max(extra, 0)))
    rows = max(counts.shape[0], grown.shape[0])
    sums = sums.clone() if extra <= 0 else sums
    counts = counts.expand(rows, -1).clone()
    sums[:, :, at : at + fresh.shape[2]] += fresh
    counts[:, at : at + fresh.shape[2]] += grown
    return BlockSums(sums, counts, filled, origin, block)


def pooled_scores(q: Tensor, k: Tensor, per_head: bool = True) -> Tensor:
    """``(B, H or Hkv, n, m)`` products of ``(B, H, n, D)`` and ``(B, Hkv, m, D)``; averaged over a KV group unless ``per_head``."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    if not per_head:
        return grouped.mean(2) @ k.transpose(-1, -2)
    return (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2)


def fill(scores: Tensor, candidate: Tensor, cost: Tensor, room: Tensor, overshoot: float = 0.0) -> Tensor:
    """Take candidates by falling score until their costs use up the room; equal scores go to the lower index.

    Args:
        scores: ``(..., n)``.
        candidate: bool, broadcastable to ``scores``.
        cost: what each candidate costs, broadcastable to ``scores``.
        room: ``(...)`` or broadcastable to it.
        overshoot: share of its cost by which the last one may exceed the room: 0 never exceeds, 0.5 rounds to the
            nearest, 1 takes until the room is reached.

    Returns:
        Bool of the shape of ``scores``.
    """
    candidate = candidate.expand(scores.shape)
    order = torch.where(candidate, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    spent = torch.where(candidate, cost.double(), 0.0).gather(-1, order)
    used = spent.cumsum(-1) - overshoot * spent
    room = room[..., None].double()
    keep = (used <= room + 1e-9 * room.abs()) & candidate.gather(-1, order)
    return torch.zeros_like(keep).scatter(-1, order, keep)
