"""Routed blocks: keys in blocks of any shape, chosen by single queries, as ``Groups`` built without an N×N mask.

A *sequence* is one row of the batch, or one packed document of it. Its keys lie in blocks; block ``c`` and the queries that
chose it attend among themselves. What is stored is one number per query and chosen block, and one per key and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.layouts import Groups
from ..kernels.call import compute_dtype
from ..kernels.pooling import filled_keys, real_rows
from .documents import documents

BlockOf = Callable[[Tensor], Tensor]
"""Positions inside a sequence → numbers of their blocks, from 0; both int64."""


@dataclass(frozen=True, eq=False)
class Sequence:
    """Blocks of one sequence; key and row indices count from its own beginning.

    Attributes:
        first_row, first_key: where it begins in the call.
        block: ``(m,)`` block of each key, −1 for keys that take part in none (padding, not yet written).
        own: ``(n,)`` block of each row's own key, −1 for rows without one.
        real: ``(n,)`` bool, False for rows of padding.
        lo, hi: ``(n,)`` keys that the base mask lets each row see: ``lo <= j < hi``.
        order: ``(m,)`` keys sorted by block, without padding. edge: ``(C+1,)`` where each block begins in it.
        start, stop: ``(C,)`` first key of each block, and one after its last.
    """

    first_row: int
    first_key: int
    block: Tensor
    own: Tensor
    real: Tensor
    lo: Tensor
    hi: Tensor
    order: Tensor
    edge: Tensor
    start: Tensor
    stop: Tensor

    @property
    def blocks(self) -> int:
        return self.start.shape[0]

    @property
    def rows(self) -> int:
        return self.own.shape[0]

    def others(self) -> Tensor:
        """``(C, n)`` bool: blocks that a row may choose: not its own, and with keys in its interval."""
        filled = self.edge.diff() > 0
        meet = (self.start[:, None] < self.hi) & (self.stop[:, None] > self.lo) & filled[:, None] & self.real
        return meet & (torch.arange(self.blocks, device=self.own.device)[:, None] != self.own)

    def owned(self) -> Tensor:
        """``(C, n)`` bool: the own block of every row that is no padding."""
        return (torch.arange(self.blocks, device=self.own.device)[:, None] == self.own) & self.real


def sequences(base: BaseMask, block_of: BlockOf, name: object) -> list[list[Sequence]]:
    """For each row of the mask (one row when all are alike) its sequences; kept in the mask's cache under ``name``."""
    memo = ("sequences", name)
    if memo not in base.cache:
        base.cache[memo] = [_split(base, b, block_of) for b in range(base.batch)]
    return base.cache[memo]


def _split(base: BaseMask, b: int, block_of: BlockOf) -> list[Sequence]:
    found = [d for d in documents(base) if d.row in (None, b)]
    if not found:
        return [_sequence(base, b, block_of, (0, base.q_len), (0, base.kv_len))]
    return [_sequence(base, b, block_of, (d.first, d.stop), (d.first, d.stop)) for d in found]


def _sequence(base: BaseMask, b: int, block_of: BlockOf, rows: tuple[int, int], keys: tuple[int, int]) -> Sequence:
    def line(x: Tensor, span: tuple[int, int]) -> Tensor:
        return x[b if x.shape[0] > 1 else 0, span[0] : span[1]]

    rank, index = line(base.rank, keys), torch.arange(*keys, device=base.device)
    real = (rank >= 0) & (index < filled_keys(base))
    if base.valid is not None:
        real = real & line(base.valid, keys)
    place = torch.where(
        rank >= 0, block_of(rank.clamp(min=0)), -1
    )  # also of padding on the right: its rows need a block
    block = torch.where(real, place, -1)
    count = int(block.max()) + 1 if block.numel() else 0
    order = torch.where(real, block, count).argsort(stable=True)[: int(real.sum())]
    sizes = torch.bincount(block[order], minlength=count)
    edge = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    length = keys[1] - keys[0]
    start = torch.full((count,), length, device=base.device).scatter_reduce(0, block[order], order, "amin")
    stop = torch.zeros(count, dtype=torch.long, device=base.device).scatter_reduce(0, block[order], order + 1, "amax")
    at = torch.arange(*rows, device=base.device) + base.shift - keys[0]
    inside = (at >= 0) & (at < length)
    own = torch.where(inside, place[at.clamp(0, max(length - 1, 0))], -1)
    lo, hi = (line(x, rows).clamp(*keys) - keys[0] for x in (base.lo, base.hi))
    own = torch.where(own < count, own, -1)
    return Sequence(rows[0], keys[0], block, own, line(real_rows(base), rows), lo, hi, order, edge, start, stop)


def block_means(k: Tensor, part: Sequence) -> Tensor:
    """``(Hkv, C, D)`` means of the keys ``(Hkv, m, D)`` of each block, in float32 (float64 for float64 keys)."""
    sizes = part.edge.diff()
    block = torch.repeat_interleave(torch.arange(part.blocks, device=k.device), sizes)
    dtype = compute_dtype(k.dtype)
    sums = torch.zeros(part.blocks, k.shape[0], k.shape[2], dtype=dtype, device=k.device)
    ordered = k[:, part.order] if not _in_order(part.order) else k[:, : part.order.shape[0]]
    sums.index_add_(0, block, ordered.transpose(0, 1).to(dtype))
    return (sums / sizes.clamp(min=1)[:, None, None]).transpose(0, 1)


def _in_order(order: Tensor) -> bool:
    return bool((order == torch.arange(order.shape[0], device=order.device)).all())


@dataclass(frozen=True, eq=False)
class Memberships:
    """Groups of one sequence and some heads, in numbers of the whole call; see :class:`Groups`."""

    q_index: Tensor
    q_sizes: Tensor
    k_index: Tensor
    k_sizes: Tensor


PIECE = 128
"""Rows of an own block that form a group: later rows of a causal block see keys that earlier ones do not."""


def own_memberships(part: Sequence, b: int, heads: int, kv_heads: int, q_len: int, kv_len: int) -> Memberships:
    """Every row with its own block, once per query head, cut into pieces that leave out the keys after their last row."""
    order = part.own.argsort(stable=True)
    order = order[int((part.own < 0).sum()) :]
    in_block = torch.bincount(part.own[order], minlength=part.blocks)
    pieces = -(-in_block // PIECE)
    block = torch.repeat_interleave(torch.arange(part.blocks, device=order.device), pieces)
    first = (torch.arange(block.shape[0], device=order.device) - (pieces.cumsum(0) - pieces)[block]) * PIECE
    sizes = (in_block[block] - first).clamp(max=PIECE)
    piece = torch.repeat_interleave(torch.arange(block.shape[0], device=order.device), sizes)
    end = torch.zeros_like(block).scatter_reduce(0, piece, part.hi[order], "amax")  # no row of the piece sees past it
    length = part.block.shape[0] + 1
    ranked = part.block[part.order] * length + part.order  # keys of a block are in order, so this rises
    seen = torch.searchsorted(ranked, block * length + end) - part.edge[block]
    alike = torch.zeros_like(block, dtype=torch.bool)  # pieces that see what the piece before them sees: one group
    alike[1:] = (block.diff() == 0) & (seen.diff() == 0)
    sizes = torch.zeros_like(sizes).index_add_(0, (~alike).cumsum(0) - 1, sizes)[: int((~alike).sum())]
    block, seen = block[~alike], seen[~alike]
    head = torch.arange(heads, device=order.device)
    q_index = ((b * heads + head)[:, None] * q_len + part.first_row + order).flatten()
    kv = (b * kv_heads + head // (heads // kv_heads)) * kv_len + part.first_key
    return _with_keys(
        part,
        q_index,
        sizes.repeat(heads),
        block.repeat(heads),
        kv.repeat_interleave(block.shape[0]),
        seen.repeat(heads),
    )


def routed_memberships(
    part: Sequence, chosen: Tensor, b: int, first_head: int, heads: int, kv_heads: int, q_len: int, kv_len: int
) -> Memberships:
    """Every query with the blocks that it chose.

    Args:
        chosen: ``(h, C, n)`` bool for the query heads ``first_head … first_head + h − 1``. Whole KV groups share a group.
    """
    per_kv = heads // kv_heads
    share = per_kv if chosen.shape[0] % per_kv == 0 and first_head % per_kv == 0 else 1
    grouped = chosen.unflatten(0, (-1, share)).transpose(1, 2)  # (h / share, C, share, n)
    q_sizes = grouped.sum((2, 3)).flatten()
    at = grouped.flatten().nonzero()[:, 0]
    row, head = at % part.rows, at // part.rows % share
    head = head + at // (part.rows * share * part.blocks) * share + first_head
    q_index = (b * heads + head) * q_len + part.first_row + row
    groups = chosen.shape[0] // share
    block = torch.arange(part.blocks, device=at.device).repeat(groups)
    kv = b * kv_heads + (first_head + torch.arange(groups, device=at.device) * share) // per_kv
    return _with_keys(part, q_index, q_sizes, block, kv.repeat_interleave(part.blocks) * kv_len + part.first_key)


def _with_keys(
    part: Sequence, q_index: Tensor, q_sizes: Tensor, block: Tensor, offset: Tensor, seen: Tensor | None = None
) -> Memberships:
    """Add the keys of each group's block, or the first ``seen`` of them; groups without queries or keys are left out."""
    k_sizes = part.edge.diff()[block] if seen is None else seen
    live = (q_sizes > 0) & (k_sizes > 0)
    if not bool(live.all()):
        q_index = q_index[torch.repeat_interleave(live, q_sizes)]
        q_sizes, block, offset, k_sizes = q_sizes[live], block[live], offset[live], k_sizes[live]
    place = torch.arange(int(k_sizes.sum()), device=block.device)
    place = place + torch.repeat_interleave(part.edge[block] - (k_sizes.cumsum(0) - k_sizes), k_sizes)
    k_index = part.order[place] + torch.repeat_interleave(offset, k_sizes)
    return Memberships(q_index, q_sizes, k_index, k_sizes)


def joined(parts: Iterable[Memberships], device: torch.device) -> Groups:
    """All memberships as one layout, merged exactly by log-sum-exp."""
    empty = torch.zeros(0, dtype=torch.long, device=device)
    none = Memberships(empty, empty, empty, empty)
    every = [none, *parts]

    def edges(sizes: Tensor) -> Tensor:
        return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    q_index, q_sizes = torch.cat([p.q_index for p in every]), torch.cat([p.q_sizes for p in every])
    k_index, k_sizes = torch.cat([p.k_index for p in every]), torch.cat([p.k_sizes for p in every])
    return Groups(q_index, edges(q_sizes), k_index, edges(k_sizes), per_head=True)


GATES = 1 << 22
"""Scores of single queries against blocks that are held at a time."""


def head_spans(heads: int, kv_heads: int, part: Sequence) -> Iterator[slice]:
    """Query heads to be scored together, whole KV groups where they fit."""
    per_kv = heads // kv_heads
    step = max(1, GATES // max(part.blocks * part.rows, 1))
    step = min(heads, step // per_kv * per_kv if step >= per_kv else step)
    return (slice(i, min(i + step, heads)) for i in range(0, heads, step))


def gates(q: Tensor, means: Tensor, heads: slice) -> Tensor:
    """``(h, C, n)`` products of mean keys ``(Hkv, C, D)`` and the queries of some heads of ``(H, n, D)``, unscaled."""
    per_kv = q.shape[0] // means.shape[0]
    own = torch.arange(heads.start, heads.stop, device=q.device) // per_kv
    return means[own] @ q[heads].to(means.dtype).transpose(1, 2)


def top_blocks(gate: Tensor, candidate: Tensor, count: int) -> Tensor:
    """``(h, C, n)`` bool: for every query the ``count`` best candidates (fewer if there are fewer); ties go to the lower block.

    ``gate`` is ``(h, C, n)``, ``candidate`` ``(C, n)``.
    """
    if count >= gate.shape[1]:
        return candidate.expand(gate.shape)
    if count == 0:
        return torch.zeros_like(gate, dtype=torch.bool)
    scores = gate.masked_fill(~candidate, -torch.inf).transpose(1, 2).contiguous()
    least = scores.topk(count, dim=-1).values[..., -1:]
    above = scores > least
    level = (scores == least) & (least > -torch.inf)
    room = count - above.sum(-1, keepdim=True)
    return (above | (level & (level.cumsum(-1) <= room))).transpose(1, 2)
