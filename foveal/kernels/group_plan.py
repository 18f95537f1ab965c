"""Which queries and keys ``gather`` lets meet for ``Groups``, as a plan for ``kernels.ragged``."""

from __future__ import annotations

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
    """The plan over q itself when no query is in two groups and groups come in few sizes; None otherwise.

    Nothing is copied, padded or merged then: windows of a token grid, packed documents of one length.
    """
    owner, plan = group_plan(call, layout, budget)
    if layout.q_index.numel() == 0 or int(torch.bincount(layout.q_index).max()) > 1:
        return None
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    if torch.unique(n_q * (n_k.max() + 1) + n_k).numel() > FEW_SIZES:
        return None
    return Plan(lambda: _batches(call, layout, budget, owner), key_reads=plan.key_reads)


def _rounded(n: Tensor) -> Tensor:
    """Sizes rounded up to an eighth of their power of two: few shapes, under 15 % padding."""
    unit = (2 ** (torch.log2(n.clamp(min=1).double()).floor() - 3)).clamp(min=1).long()
    return (n + unit - 1) // unit * unit


def _batches(call: AttentionCall, layout: Groups, budget: int, owner: Tensor | None = None) -> Iterator[Batch]:
    """Buckets of groups; with ``owner``, of groups of exactly one size, whose rows are those of q."""
    base, device = call.base, call.q.device
    heads, kv_heads, group = call.q.shape[1], call.k.shape[1], call.groups
    q_len, kv_len = base.q_len, base.kv_len
    copies, members = 1 if layout.per_head else heads, layout.q_index.numel()
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    live = ((n_q > 0) & (n_k > 0)).nonzero(as_tuple=True)[0]
    if live.numel() == 0:
        return
    width_q, width_k = (n[live] if owner is not None else _rounded(n[live]) for n in (n_q, n_k))
    everything = owner is not None and base.plain and not base.causal
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
            hide = None
            if not everything:
                seen = ok_q[:, :, None] & ok_k[:, None, :]
                seen = seen & base.allowed(b[:, :, None], torch.zeros_like(b)[:, :, None], i[:, :, None], j[:, None, :])
                hide = None if device.type == "cpu" and bool(seen.all()) else (0, ~seen[:, None])
            for h in range(copies):
                rows_q = (at_q + h * members).where(ok_q, copies * members)
                rows_q = rows_q if owner is None else owner[rows_q]
                rows_k = at_k if layout.per_head else ((at_k // kv_len) * kv_heads + h // group) * kv_len + j
                bias = None
                if call.bias is not None:
                    head = (ids // q_len) % heads if layout.per_head else torch.full_like(ids, h)
                    bias = relative_index(call, i[:, :, None], j[:, None, :]) + head[:, :, None] * call.bias.shape[1]
                yield Batch(rows_q, rows_k, hide, bias)
