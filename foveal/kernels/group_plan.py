"""Which queries and keys ``gather`` lets meet for ``Groups``, as a plan for ``kernels.ragged``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.layouts import Groups
from .call import AttentionCall, relative_index
from .rows import Batch, Plan, consecutive_rows, penalties, split_rows


def group_plan(call: AttentionCall, layout: Groups, budget: int) -> Plan:
    """The plan for ``combine="softmax"``: rows of the flattened q, each as often as it is in a group; pieces bucketed by size.

    The spare row after the last one takes what pads a bucket.
    """
    heads, q_len = call.q.shape[1], call.base.q_len

    def batches() -> Iterator[Batch]:
        return _batches(call, layout, budget, _Numbering(call.q.shape[0] * heads * q_len, q_len))

    return Plan(batches, key_reads=_reads(call, layout), repeats=True)


def member_plan(call: AttentionCall, layout: Groups, budget: int) -> Plan:
    """The plan for ``combine="mean"``: memberships in the order of :func:`owners`, each a row of its own; and the spare row."""
    members = layout.q_index.numel()
    copies = 1 if layout.per_head else call.q.shape[1]

    def batches() -> Iterator[Batch]:
        return _batches(call, layout, budget, _Numbering(copies * members, members, of_members=True))

    return Plan(batches, key_reads=_reads(call, layout))


def _reads(call: AttentionCall, layout: Groups) -> int:
    return layout.k_index.numel() * (1 if layout.per_head else call.q.shape[1])


@dataclass(frozen=True)
class _Numbering:
    """What the rows of a plan count: ``spare`` is their number, ``step`` lies between the heads that share groups."""

    spare: int
    step: int
    of_members: bool = False


def owners(call: AttentionCall, layout: Groups) -> Tensor:
    """Flattened query row of every membership: of one head after the other where heads share the groups."""
    if layout.per_head:
        return layout.q_index
    heads, q_len = call.q.shape[1], call.base.q_len
    b, i = layout.q_index // q_len, layout.q_index % q_len
    h = torch.arange(heads, device=call.q.device)
    return ((b * heads)[None] + h[:, None]).mul(q_len).add(i).reshape(-1)


def average(call: AttentionCall, layout: Groups, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """``combine="mean"``: one output per query from one per membership ``(M, Dv)``, in the order of :func:`owners`."""
    owner, total = owners(call, layout), call.q.shape[0] * call.q.shape[1] * call.q.shape[2]
    out = out.to(lse.dtype)
    count = torch.zeros(total, dtype=lse.dtype, device=lse.device).index_add(0, owner, torch.ones_like(lse))
    mean = torch.zeros(total, out.shape[-1], dtype=lse.dtype, device=out.device)
    mean = mean.index_add(0, owner, out / count[owner, None])
    top = torch.full_like(count, -torch.inf).scatter_reduce(0, owner, lse.detach(), "amax")
    safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    norm = torch.zeros_like(safe).index_add(0, owner, torch.exp(lse - safe[owner]))
    seen = norm > 0
    merged_lse = torch.where(seen, torch.log(torch.where(seen, norm, torch.ones_like(norm))) + safe, -torch.inf)
    shape = call.q.shape[:3]
    return mean.to(call.q.dtype).view(*shape, -1), merged_lse.view(shape)


SLOTS = 1 << 18
"""Slots of queries and keys whose places are worked out at once."""
SMALL_BUCKET = 1 << 18
"""Scores that take no longer than one more shape of pieces does."""
FEW_SIZES = 16
"""Different group sizes up to which groups of one size run together without padding."""


def direct_plan(call: AttentionCall, layout: Groups, budget: int) -> Plan | None:
    """The plan over q itself when no query is in two groups, groups come in few sizes and every pair of a group is allowed.

    Nothing is copied, padded, masked or merged then: windows of a token grid, packed documents of few lengths. None otherwise.
    Where the rows lie is remembered for as long as the layout lives.
    """
    if call.bias is not None or not call.base.plain or call.base.causal or layout.q_index.numel() == 0:
        return None
    sizes = (call.q.shape[1], call.k.shape[1], call.base.q_len, call.base.kv_len)
    known = _direct.setdefault(layout, {})
    if sizes not in known:
        known[sizes] = _direct_rows(layout, *sizes)
    found = known[sizes]
    if found is None:
        return None

    def batches() -> Iterator[Batch]:
        for q_rows, k_rows in found.rows:
            elements = q_rows.shape[1] * found.q_unit * k_rows.shape[1] * found.k_unit
            for part in split_rows(q_rows.shape[0], elements, budget):
                yield Batch(q_rows[part], k_rows[part])

    reads = sum(k_rows.numel() for _, k_rows in found.rows) * found.k_unit
    written = sum(q_rows.numel() for q_rows, _ in found.rows) * found.q_unit
    covers = written == math.prod(call.q.shape[:3])
    return Plan(batches, found.q_unit, found.k_unit, key_reads=reads, covers=covers)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Per group size ``(heads · groups, units)`` rows of the flattened q and k, in units."""

    q_unit: int
    k_unit: int
    rows: list[tuple[Tensor, Tensor]]


_direct: weakref.WeakKeyDictionary[Groups, dict[tuple[int, ...], _Rows | None]] = weakref.WeakKeyDictionary()


def _direct_rows(layout: Groups, heads: int, kv_heads: int, q_len: int, kv_len: int) -> _Rows | None:
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    sizes = torch.unique(torch.stack([n_q, n_k], -1), dim=0)
    if sizes.shape[0] > FEW_SIZES or int(torch.bincount(layout.q_index).max()) > 1:
        return None
    q_unit = consecutive_rows(layout.q_index, sizes[:, 0].tolist(), q_len)
    k_unit = consecutive_rows(layout.k_index, sizes[:, 1].tolist(), kv_len)
    device = layout.q_index.device
    h = torch.arange(1 if layout.per_head else heads, device=device)[:, None, None]

    def rows(index: Tensor, unit: int, length: int, of: Tensor, count: int) -> Tensor:
        units = torch.div(index[:, ::unit], unit, rounding_mode="floor")[None]
        if layout.per_head:
            return units[0]
        per = length // unit
        batch = torch.div(units[..., :1], per, rounding_mode="floor")
        return (units + (batch * (count - 1) + of) * per).flatten(0, 1)

    found = []
    for m, w in sizes.tolist():
        if m == 0 or w == 0:
            continue
        live = ((n_q == m) & (n_k == w)).nonzero()[:, 0]
        q = layout.q_index[layout.cu_q[live, None] + torch.arange(m, device=device)]
        k = layout.k_index[layout.cu_k[live, None] + torch.arange(w, device=device)]
        of = torch.div(h, heads // kv_heads, rounding_mode="floor")
        found.append((rows(q, q_unit, q_len, h, heads), rows(k, k_unit, kv_len, of, kv_heads)))
    return _Rows(q_unit, k_unit, found)


def _rounded(n: Tensor) -> Tensor:
    """Sizes rounded up to an eighth of their power of two: few shapes, under 15 % padding."""
    unit = (2 ** (torch.log2(n.clamp(min=1).double()).floor() - 3)).clamp(min=1).long()
    return (n + unit - 1) // unit * unit


def _pieces(layout: Groups, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(group, first, rows)`` of every piece: groups with many queries are cut so that a piece's scores fit the budget."""
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    most = (budget // n_k.clamp(min=1)).clamp(min=64) // 64 * 64
    count = torch.where(n_k > 0, -(-n_q // most), 0)
    group = torch.repeat_interleave(torch.arange(n_q.numel(), device=n_q.device), count)
    nth = torch.arange(group.numel(), device=n_q.device) - (count.cumsum(0) - count)[group]
    first = nth * most[group]
    return group, layout.cu_q[group] + first, torch.minimum(n_q[group] - first, most[group])


def _batches(call: AttentionCall, layout: Groups, budget: int, rows: _Numbering) -> Iterator[Batch]:
    heads, group = call.q.shape[1], call.groups
    for m, w, pieces in _buckets(layout, budget):
        bucket = _bucket(call, layout, rows, *pieces, m, w)
        for part in split_rows(pieces[0].numel(), m * w, budget):
            hidden = _hidden(bucket, part)
            hide = None if hidden is None else (0, hidden[:, None])
            for h in range(1 if layout.per_head else heads):
                q_rows, k_rows, bias = bucket.q_rows[part], bucket.k_rows[part], None
                if h:
                    q_rows = (q_rows + h * rows.step).clamp_(max=rows.spare)
                    k_rows = k_rows + h // group * call.base.kv_len
                if call.bias is not None:
                    head = bucket.h[part] + h
                    column = relative_index(call, bucket.i[part, :, None], bucket.j[part, None, :])
                    bias = column + head[:, :, None] * call.bias.shape[1]
                yield Batch(q_rows, k_rows, hide, bias)


def _buckets(layout: Groups, budget: int) -> Iterator[tuple[int, int, tuple[Tensor, Tensor, Tensor]]]:
    """Pieces of the same rounded numbers ``(queries, keys)``, a limited number at once: their groups, first memberships and rows."""
    of, first_q, n_q = _pieces(layout, budget)
    if of.numel() == 0:
        return
    width_q, width_k = _rounded(n_q), _rounded(layout.cu_k.diff()[of])
    code = width_k * (width_q.max() + 1) + width_q
    order = torch.argsort(code, stable=True)
    _, counts = torch.unique_consecutive(code[order], return_counts=True)
    first = order[counts.cumsum(0) - counts]
    start = 0
    for m, w, count in _joined(torch.stack([width_q[first], width_k[first], counts], -1).tolist()):
        for chosen in order[start : start + count].split(max(1, SLOTS // (m + w))):
            yield m, w, (of[chosen], first_q[chosen], n_q[chosen])
        start += count


def _joined(shapes: list[list[int]]) -> Iterator[tuple[int, int, int]]:
    """``(queries, keys, pieces)`` without shapes of little work, which are padded to the next one of as many keys."""
    waiting = 0
    for (m, w, count), (then, keys, _) in zip(shapes, [*shapes[1:], [0, 0, 0]], strict=True):
        waiting += count
        if keys != w or waiting * then * w > SMALL_BUCKET:
            yield m, w, waiting
            waiting = 0


@dataclass(frozen=True, eq=False)
class _Bucket:
    """Pieces of one shape ``(m, w)``; what a common head does not change is worked out once, and only when it is asked for.

    Attributes:
        base, heads: the call's mask, and its query heads where every head has groups of its own, else 1.
        q_rows: ``(count, m)`` rows of the plan, of head 0 where heads share the groups; slots that pad are the spare one.
        k_rows: ``(count, w)`` rows of the flattened k, of head 0 where heads share the groups.
        q_index, k_index: what the layout lists for each slot. full_q, full_k: whether the slot is used.
        b, h, i: ``(count, m)`` batch row, head (0 where heads share the groups) and query row of each slot.
        j: ``(count, w)`` key of each slot.
    """

    base: BaseMask
    heads: int
    q_rows: Tensor
    k_rows: Tensor
    q_index: Tensor
    k_index: Tensor
    full_q: Tensor
    full_k: Tensor

    @cached_property
    def i(self) -> Tensor:
        return self.q_index % self.base.q_len

    @cached_property
    def j(self) -> Tensor:
        return self.k_index % self.base.kv_len

    @cached_property
    def b(self) -> Tensor:
        return torch.div(self.q_index, self.base.q_len * self.heads, rounding_mode="floor")

    @cached_property
    def h(self) -> Tensor:
        return torch.div(self.q_index, self.base.q_len, rounding_mode="floor") % self.heads

    @cached_property
    def open(self) -> bool:
        """Whether every pair that is asked for is visible."""
        return self.base.plain and not self.base.causal and bool(self.full_k.all())

    @cached_property
    def bounds(self) -> _Bounds | None:
        """Where comparing ``j`` tells what is visible, and fast: float32 counts up to 2^24."""
        fits = self.base.predicate is None and self.q_rows.device.type == "cpu" and self.base.kv_len < 1 << 24
        return _bounds(self) if fits else None


def _bucket(
    call: AttentionCall, layout: Groups, rows: _Numbering, of: Tensor, first: Tensor, count: Tensor, m: int, w: int
) -> _Bucket:
    base, heads, kv_heads = call.base, call.q.shape[1], call.k.shape[1]
    slot_q, slot_k = torch.arange(m, device=call.q.device), torch.arange(w, device=call.q.device)
    full_q, full_k = slot_q < count[:, None], slot_k < layout.cu_k.diff()[of, None]
    at_q = first[:, None] + slot_q
    q_index = layout.q_index[at_q.clamp(max=layout.q_index.numel() - 1)]
    k_index = layout.k_index[(layout.cu_k[of, None] + slot_k).where(full_k, 0)]
    own, k_rows = q_index, k_index
    if not layout.per_head:
        own = q_index + torch.div(q_index, base.q_len, rounding_mode="floor") * ((heads - 1) * base.q_len)
        k_rows = k_index + torch.div(k_index, base.kv_len, rounding_mode="floor") * ((kv_heads - 1) * base.kv_len)
    q_rows = (at_q if rows.of_members else own).where(full_q, rows.spare)
    return _Bucket(base, heads if layout.per_head else 1, q_rows, k_rows, q_index, k_index, full_q, full_k)


@dataclass(frozen=True, eq=False)
class _Bounds:
    """Slot ``j`` is visible to a row when ``lo <= j < hi``, in float32: comparisons that give float are vectorised, those that give bool are not.

    Attributes:
        lo: ``(count, m)``, None where it hides nothing. hi: ``(count, m or 1)``.
        j: ``(count, w)``, infinite where the slot is hidden from all.
        cut: per piece, whether a pair of it is hidden.
    """

    lo: Tensor | None
    hi: Tensor
    j: Tensor
    cut: list[bool]


def _bounds(bucket: _Bucket) -> _Bounds:
    base, real = bucket.base, bucket.full_k
    if base.valid is not None:
        real = real & base.valid[bucket.b[:, :1] if base.valid.shape[0] > 1 else 0, bucket.j]
    j = bucket.j.float().where(real, torch.inf)
    cut = ~real.all(1)
    if base.plain and not base.causal:
        return _Bounds(None, j.new_full((j.shape[0], 1), base.kv_len), j, cut.tolist())
    row = bucket.b if base.lo.shape[0] > 1 else 0
    lo, hi = base.lo[row, bucket.i].float(), base.hi[row, bucket.i].float()
    low, high = j.amin(1, keepdim=True), j.where(real, -1.0).amax(1, keepdim=True)
    early = (lo > low) & bucket.full_q  # rows that pad are never read, so they may see anything
    late = (hi <= high) & bucket.full_q
    return _Bounds(lo if bool(early.any()) else None, hi, j, (cut | (early | late).any(1)).tolist())


def _hidden(bucket: _Bucket, part: slice) -> Tensor | None:
    """``(R, m or 1, w)``: True hides, or −inf does; None when every pair is visible."""
    if bucket.open:
        return None
    bounds = bucket.bounds
    if bounds is None:
        b, i, j = bucket.b[part, :, None], bucket.i[part, :, None], bucket.j[part, None, :]
        seen = bucket.base.allowed(b, torch.zeros_like(b), i, j)
        return ~(seen & bucket.full_q[part, :, None] & bucket.full_k[part, None, :])
    if not any(bounds.cut[part]):
        return None
    hi, j = bounds.hi[part, :, None], bounds.j[part, None, :]
    hidden = torch.empty(hi.shape[0], hi.shape[1], j.shape[2], device=j.device)
    torch.ge(j, hi, out=hidden)
    if bounds.lo is not None:
        hidden.add_(torch.lt(j, bounds.lo[part, :, None], out=torch.empty_like(hidden)))
    return penalties(hidden)
