"""The definition: softmax attention over exactly the visible pairs, written out in float64.

Slow, O(N²) in memory, and the oracle of every test. Reads like the equation
``out_i = Σ_j w_ij v_j``, ``w_ij = exp(s_ij − lse_i)``, ``lse_i = log Σ_j exp(s_ij)`` over visible ``j``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.density import visible
from ..core.layouts import BlockMask, Groups, KeySelection, block_mask_kinds
from .call import AttentionCall, relative_index


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of shapes ``(B, H, Nq, Dv)`` and ``(B, H, Nq)``; differentiable by plain autograd."""
    q, k, v = (t.double() for t in (call.q, call.k, call.v))
    k, v = k.repeat_interleave(call.groups, 1), v.repeat_interleave(call.groups, 1)
    logits = (q @ k.transpose(-1, -2)) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.bias is not None:
        rows = torch.arange(call.base.q_len, device=q.device)[:, None]
        cols = torch.arange(call.base.kv_len, device=q.device)[None, :]
        logits = logits + call.bias.double()[:, relative_index(call, rows, cols)]
    if isinstance(call.layout, Groups):
        out, lse = _attend_groups(call, logits, v, call.layout)
    else:
        seen = visible_pairs(call)
        lse = torch.logsumexp(logits.masked_fill(~seen, -torch.inf), -1)
        out = _weights(logits, seen, lse) @ v
    return out.to(call.q.dtype), lse.to(torch.promote_types(call.q.dtype, torch.float32))


def _weights(logits: Tensor, seen: Tensor, lse: Tensor) -> Tensor:
    safe = torch.where(torch.isinf(lse), torch.zeros_like(lse), lse)  # a row that sees nothing has weights 0, not NaN
    return torch.where(seen, torch.exp(logits.masked_fill(~seen, 0.0) - safe[..., None]), 0.0)


def visible_pairs(call: AttentionCall) -> Tensor:
    """``(B, H, Nq, Nk)`` bool: the pairs that layout and base both keep, every position evaluated."""
    batch, heads = call.q.shape[:2]
    base = call.base
    device = call.q.device
    b = torch.arange(batch, device=device)[:, None, None, None]
    h = torch.arange(heads, device=device)[None, :, None, None]
    q = torch.arange(base.q_len, device=device)[None, None, :, None]
    k = torch.arange(base.kv_len, device=device)[None, None, None, :]
    seen = base.allowed(b, h, q, k).expand(batch, heads, base.q_len, base.kv_len)
    layout = call.layout
    if layout is None:
        return seen
    if isinstance(layout, BlockMask):
        kinds = block_mask_kinds(layout)
        kinds = kinds.expand(batch, heads, *kinds.shape[2:])
        tile = kinds[b, h, q // layout.BLOCK_SIZE[0], k // layout.BLOCK_SIZE[1]]
        inside = layout.mask_mod(b, h, q, k)
        return seen & ((tile == 2) | ((tile == 1) & inside))
    if isinstance(layout, Groups):
        pairs = torch.zeros_like(seen)
        for q_set, k_set in _sets(call, layout):
            pairs = pairs | (q_set[..., None] & k_set[:, :, None])
        return seen & pairs
    assert isinstance(layout, KeySelection)
    kept = torch.zeros(batch, heads, base.q_len, base.kv_len + 1, dtype=torch.bool, device=device)
    for block in range(layout.index.shape[2]):
        ok = visible(layout, base, block, batch)
        ok = ok.repeat_interleave(heads // ok.shape[1], 1)
        index = layout.index[:, :, block].expand(batch, -1, -1)
        index = index.repeat_interleave(heads // index.shape[1], 1)[:, :, None].expand_as(ok)
        first = block * layout.block_size
        kept[:, :, first : first + layout.block_size].scatter_(-1, torch.where(ok, index, base.kv_len), True)
    return seen & kept[..., : base.kv_len]


def _sets(call: AttentionCall, layout: Groups) -> Iterator[tuple[Tensor, Tensor]]:
    """For every group its queries ``(B, H, Nq)`` and keys ``(B, H, Nk)``, bool."""
    batch, heads, q_len = call.q.shape[:3]
    kv_heads, kv_len = call.k.shape[1:3]
    for g in range(layout.cu_q.numel() - 1):
        q_set = torch.zeros(batch, heads, q_len, dtype=torch.bool, device=call.q.device)
        k_set = torch.zeros(batch, heads, kv_len, dtype=torch.bool, device=call.q.device)
        q_ids = layout.q_index[layout.cu_q[g] : layout.cu_q[g + 1]]
        k_ids = layout.k_index[layout.cu_k[g] : layout.cu_k[g + 1]]
        if layout.per_head:
            q_set.view(-1)[q_ids] = True
            per_kv = torch.zeros(batch, kv_heads, kv_len, dtype=torch.bool, device=call.q.device)
            per_kv.view(-1)[k_ids] = True
            k_set = per_kv.repeat_interleave(call.groups, 1)
        else:
            q_set[q_ids // q_len, :, q_ids % q_len] = True
            k_set[k_ids // kv_len, :, k_ids % kv_len] = True
        yield q_set, k_set


def _attend_groups(call: AttentionCall, logits: Tensor, v: Tensor, layout: Groups) -> tuple[Tensor, Tensor]:
    batch, heads, q_len, kv_len = logits.shape
    device = logits.device
    base = call.base.dense(batch)
    member = torch.zeros(batch, heads, q_len, dtype=logits.dtype, device=device)
    outs = torch.zeros(batch, heads, q_len, v.shape[-1], dtype=logits.dtype, device=device)
    count = torch.zeros(batch, heads, q_len, kv_len, dtype=logits.dtype, device=device)
    for q_set, k_set in _sets(call, layout):
        seen = q_set[..., None] & k_set[:, :, None] & base[:, None]
        lse = torch.logsumexp(logits.masked_fill(~seen, -torch.inf), -1)
        outs = outs + _weights(logits, seen, lse) @ v
        member = member + q_set.to(member.dtype)
        count = count + seen.to(count.dtype)
    seen = count > 0
    weighted = logits + torch.log(count.clamp(min=1))
    lse = torch.logsumexp(weighted.masked_fill(~seen, -torch.inf), -1)
    if layout.combine == "mean":
        return outs / member.clamp(min=1)[..., None], lse
    return _weights(weighted, seen, lse) @ v, lse
