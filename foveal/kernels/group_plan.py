"""Which queries and keys ``gather`` lets meet for ``Groups``, as a plan for ``kernels.ragged``."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.layouts import Groups
from .call import AttentionCall, relative_index
from .ragged import Batch, Plan, split_rows


def group_plan(call: AttentionCall, layout: Groups, budget: int) -> tuple[Tensor, Plan]:
    """``owner``: flattened query row of every membership; and the plan over memberships, bucketed by size.

    The plan writes one row more than there are memberships: the spare row takes what pads a bucket.
    """
    device, q_len = call.q.device, call.base.q_len
    heads = call.q.shape[1]
    owner = layout.q_index
    if not layout.per_head:
        b, i = layout.q_index // q_len, layout.q_index % q_len
        h = torch.arange(heads, device=device)
        owner = ((b * heads)[None] + h[:, None]).mul(q_len).add(i).reshape(-1)
    copies = 1 if layout.per_head else heads
    reads = layout.k_index.numel() * copies
    return owner, Plan(lambda: _batches(call, layout, budget), key_reads=reads)


FEW_SIZES = 16
"""Different group sizes up to which groups of one size run together without padding."""


def direct_plan(call: AttentionCall, layout: Groups, budget: int) -> Plan | None:
    """The plan over q itself when no query is in two groups, groups come in few sizes and every pair of a group is allowed.

    Nothing is copied, padded, masked or merged then: windows of a token grid, packed documents of few lengths. None otherwise.
    """
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    if call.bias is not None or not call.base.plain or call.base.causal or layout.q_index.numel() == 0:
        return None
    sizes = torch.unique(torch.stack([n_q, n_k], -1), dim=0)
    if sizes.shape[0] > FEW_SIZES or int(torch.bincount(layout.q_index).max()) > 1:
        return None
    q_unit = _unit(layout.q_index, sizes[:, 0], call.base.q_len)
    k_unit = _unit(layout.k_index, sizes[:, 1], call.base.kv_len)
    copies = 1 if layout.per_head else call.q.shape[1]
    batches = functools.partial(_direct_batches, call, layout, budget, sizes.tolist(), q_unit, k_unit)
    return Plan(batches, q_unit, k_unit, key_reads=layout.k_index.numel() * copies)


def _unit(index: Tensor, sizes: Tensor, length: int) -> int:
    """Most consecutive rows, up to 16, in which all groups can be read: runs that begin at multiples of it."""
    for unit in (16, 8, 4, 2):
        if length % unit == 0 and not bool((sizes % unit).any()):
            runs = index.view(-1, unit)
            steps = torch.arange(unit, device=index.device)
            if not bool((runs[:, 0] % unit).any()) and bool((runs == runs[:, :1] + steps).all()):
                return unit
    return 1


def _direct_batches(
    call: AttentionCall, layout: Groups, budget: int, sizes: list[list[int]], q_unit: int, k_unit: int
) -> Iterator[Batch]:
    device, heads, kv_heads = call.q.device, call.q.shape[1], call.k.shape[1]
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    h = torch.zeros(1, dtype=torch.long) if layout.per_head else torch.arange(heads)
    h = h.to(device)[:, None, None]

    def rows(index: Tensor, unit: int, length: int, of: Tensor, count: int) -> Tensor:
        """``(heads · groups, units)`` rows of the flattened tensors."""
        units = torch.div(index[:, ::unit], unit, rounding_mode="floor")[None]
        if layout.per_head:
            return units[0]
        per, first = length // unit, torch.div(units[..., :1], length // unit, rounding_mode="floor")
        return (units + (first * (count - 1) + of) * per).flatten(0, 1)

    for m, w in sizes:
        if m == 0 or w == 0:
            continue
        live = ((n_q == m) & (n_k == w)).nonzero()[:, 0]
        q = layout.q_index[layout.cu_q[live, None] + torch.arange(m, device=device)]
        k = layout.k_index[layout.cu_k[live, None] + torch.arange(w, device=device)]
        q_rows = rows(q, q_unit, call.base.q_len, h, heads)
        k_rows = rows(k, k_unit, call.base.kv_len, torch.div(h, call.groups, rounding_mode="floor"), kv_heads)
        for part in split_rows(q_rows.shape[0], m * w, budget):
            yield Batch(q_rows[part], k_rows[part])


def _rounded(n: Tensor) -> Tensor:
    """Sizes rounded up to an eighth of their power of two: few shapes, under 15 % padding."""
    unit = (2 ** (torch.log2(n.clamp(min=1).double()).floor() - 3)).clamp(min=1).long()
    return (n + unit - 1) // unit * unit


def _batches(call: AttentionCall, layout: Groups, budget: int) -> Iterator[Batch]:
    base, device = call.base, call.q.device
    heads, kv_heads, group = call.q.shape[1], call.k.shape[1], call.groups
    q_len, kv_len = base.q_len, base.kv_len
    copies, members = 1 if layout.per_head else heads, layout.q_index.numel()
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    live = ((n_q > 0) & (n_k > 0)).nonzero(as_tuple=True)[0]
    if live.numel() == 0:
        return
    width_q, width_k = _rounded(n_q[live]), _rounded(n_k[live])
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
            g = live[chosen[part]]
            ok_q, ok_k = slot_q < n_q[g, None], slot_k < n_k[g, None]
            at_q = (layout.cu_q[g, None] + slot_q).where(ok_q, members)
            at_k = layout.k_index[(layout.cu_k[g, None] + slot_k).where(ok_k, 0)]
            ids = layout.q_index[at_q.clamp(max=members - 1)]
            i, j = ids % q_len, at_k % kv_len
            b = ids // (q_len * (heads if layout.per_head else 1))
            seen = ok_q[:, :, None] & ok_k[:, None, :]
            seen = seen & base.allowed(b[:, :, None], torch.zeros_like(b)[:, :, None], i[:, :, None], j[:, None, :])
            hide = None if device.type == "cpu" and bool(seen.all()) else (0, ~seen[:, None])
            for h in range(copies):
                rows_q = (at_q + h * members).where(ok_q, copies * members)
                rows_k = at_k if layout.per_head else ((at_k // kv_len) * kv_heads + h // group) * kv_len + j
                bias = None
                if call.bias is not None:
                    head = (ids // q_len) % heads if layout.per_head else torch.full_like(ids, h)
                    bias = relative_index(call, i[:, :, None], j[:, None, :]) + head[:, :, None] * call.bias.shape[1]
                yield Batch(rows_q, rows_k, hide, bias)
