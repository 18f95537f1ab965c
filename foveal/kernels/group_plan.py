"""Which queries and keys ``gather`` lets meet for ``Groups``, as a plan for ``kernels.ragged``."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.layouts import Groups
from .call import AttentionCall, relative_index
from .rows import Batch, Plan, split_rows


def group_plan(call: AttentionCall, layout: Groups, budget: int) -> tuple[Tensor, Plan]:
    """``owner``: flattened query row of every membership; and the plan over memberships, bucketed by size.

    The plan writes one row more than there are memberships: the spare row takes what pads a bucket.
    """
    reads = layout.k_index.numel() * (1 if layout.per_head else call.q.shape[1])
    return owners(call, layout), Plan(lambda: _batches(call, layout, budget), key_reads=reads)


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


def _unit(index: Tensor, sizes: Tensor, length: int) -> int:
    """Most consecutive rows, up to 16, in which all groups can be read: runs that begin at multiples of it."""
    for unit in (16, 8, 4, 2):
        if length % unit == 0 and not bool((sizes % unit).any()):
            runs = index.view(-1, unit)
            steps = torch.arange(unit, device=index.device)
            if not bool((runs[:, 0] % unit).any()) and bool((runs == runs[:, :1] + steps).all()):
                return unit
    return 1


def _direct_rows(layout: Groups, heads: int, kv_heads: int, q_len: int, kv_len: int) -> _Rows | None:
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    sizes = torch.unique(torch.stack([n_q, n_k], -1), dim=0)
    if sizes.shape[0] > FEW_SIZES or int(torch.bincount(layout.q_index).max()) > 1:
        return None
    q_unit, k_unit = _unit(layout.q_index, sizes[:, 0], q_len), _unit(layout.k_index, sizes[:, 1], kv_len)
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


def _batches(call: AttentionCall, layout: Groups, budget: int) -> Iterator[Batch]:
    base, device = call.base, call.q.device
    heads, kv_heads, group = call.q.shape[1], call.k.shape[1], call.groups
    q_len, kv_len = base.q_len, base.kv_len
    copies, members = 1 if layout.per_head else heads, layout.q_index.numel()
    of, first_q, n_q = _pieces(layout, budget)
    if of.numel() == 0:
        return
    n_k = layout.cu_k.diff()[of]
    width_q, width_k = _rounded(n_q), _rounded(n_k)
    code = width_q * (width_k.max() + 1) + width_k
    order = torch.argsort(code, stable=True)
    _, counts = torch.unique_consecutive(code[order], return_counts=True)
    first = order[counts.cumsum(0) - counts]
    start = 0
    for m, w, count in torch.stack([width_q[first], width_k[first], counts], -1).tolist():
        chosen = order[start : start + count]
        start += count
        slot_q, slot_k = torch.arange(m, device=device), torch.arange(w, device=device)
        for part in split_rows(count, m * w, budget):
            g = chosen[part]
            ok_q, ok_k = slot_q < n_q[g, None], slot_k < n_k[g, None]
            at_q = (first_q[g, None] + slot_q).where(ok_q, members)
            at_k = layout.k_index[(layout.cu_k[of[g], None] + slot_k).where(ok_k, 0)]
            ids = layout.q_index[at_q.clamp(max=members - 1)]
            i, j = ids % q_len, at_k % kv_len
            b = ids // (q_len * (heads if layout.per_head else 1))
            hidden = _hidden(base, b, i, j, ok_q, ok_k)
            hide = None if hidden is None else (0, hidden[:, None])
            for h in range(copies):
                rows_q = (at_q + h * members).where(ok_q, copies * members)
                rows_k = at_k if layout.per_head else ((at_k // kv_len) * kv_heads + h // group) * kv_len + j
                bias = None
                if call.bias is not None:
                    head = (ids // q_len) % heads if layout.per_head else torch.full_like(ids, h)
                    bias = relative_index(call, i[:, :, None], j[:, None, :]) + head[:, :, None] * call.bias.shape[1]
                yield Batch(rows_q, rows_k, hide, bias)


def _hidden(base: BaseMask, b: Tensor, i: Tensor, j: Tensor, ok_q: Tensor, ok_k: Tensor) -> Tensor | None:
    """``(R, m, w)`` bool, True hides; None when every pair is visible. Whole intervals are compared before single pairs.

    Args:
        b, i, ok_q: ``(R, m)`` batch row and query row of each slot, and whether the slot is used.
        j, ok_k: ``(R, w)`` key of each slot, and whether it is used.
    """
    if base.predicate is not None or i.device.type != "cpu":
        seen = base.allowed(b[:, :, None], torch.zeros_like(b)[:, :, None], i[:, :, None], j[:, None, :])
        return ~(seen & ok_q[:, :, None] & ok_k[:, None, :])
    if base.valid is not None:
        ok_k = ok_k & base.valid[b[:, :1] if base.valid.shape[0] > 1 else 0, j]
    row = b if base.lo.shape[0] > 1 else 0
    lo, hi = base.lo[row, i], base.hi[row, i]
    hidden = None if bool(ok_k.all()) else ~ok_k[:, None, :]  # rows that pad are never read, so they may see anything
    low, high = j.where(ok_k, base.kv_len).amin(1, keepdim=True), j.where(ok_k, -1).amax(1, keepdim=True)
    after, before = bool(((hi <= high) & ok_q).any()), bool(((lo > low) & ok_q).any())
    if after:
        late = j[:, None, :] >= hi[:, :, None]
        hidden = late if hidden is None else late.logical_or_(hidden)
    if before:
        early = j[:, None, :] < lo[:, :, None]
        hidden = early if hidden is None else early.logical_or_(hidden)
    return hidden
