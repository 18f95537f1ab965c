"""Figures that need a row's whole distribution, on sampled rows: entropy, keys for 90 % of the mass, the selected keys.

Scores are made for a few rows at a time and dropped (``foveal.lens.scores``).
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.call import AttentionCall, compute_dtype, relative_index
from .scores import budget, logits
from .stats import Rows

MASS = 0.9
"""Share of a row's mass that ``keys90`` counts keys for."""
_SLACK = 1e-6
"""Rounding allowed when comparing a float32 sum of weights with ``1 − MASS``."""


@dataclass(frozen=True, eq=False)
class RowFigures:
    """Values on the drawn rows; the distribution is over keys, without a learned sink.

    Attributes:
        entropy: ``(B, H, R)`` float32, nats.
        keys90: ``(B, H, R)`` int64, fewest keys that hold 90 % of the mass.
        distance: ``(B, H, R)`` float32, mean of ``|own position − key position|`` in tokens; 0 under a
            causal mask, where :class:`RowMasses` has it for all rows.
        allowed: ``(B, R)`` int64, keys that the row may see.
        received: ``(B, H, Nk)`` float32, share of its sequence's attention that each key receives; sums to 1.
        selected: ``(B, 1 + Hkv, R, top)`` int32 key indices, best first, −1 where fewer are visible: by the weights
            averaged over all heads, then by those averaged over the query heads of each key head.
    """

    entropy: Tensor
    keys90: Tensor
    distance: Tensor
    allowed: Tensor
    received: Tensor
    selected: Tensor


@torch.no_grad()
def row_figures(call: AttentionCall, lse: Tensor, rows: Rows, *, top: int) -> RowFigures:
    """Measure the drawn rows.

    Args:
        call: q, k, base, scale, softcap and bias are used; the attention is the model's own, dense.
        lse: ``(B, H, Nq)`` log-sum-exp over the keys of every row.
        rows: the draw.
        top: keys per selected set.
    """
    batch, heads = call.q.shape[:2]
    kv_heads, kv_len = call.k.shape[1:3]
    drawn = rows.index.shape[1]
    device, dtype = call.q.device, compute_dtype(call.q.dtype)
    entropy = torch.zeros(batch, heads, drawn, dtype=dtype, device=device)
    distance = torch.zeros_like(entropy)
    keys90 = torch.zeros(batch, heads, drawn, dtype=torch.long, device=device)
    allowed = torch.zeros(batch, drawn, dtype=torch.long, device=device)
    received = torch.zeros(batch, heads, kv_len, dtype=dtype, device=device)
    selected = torch.full((batch, 1 + kv_heads, drawn, top), -1, dtype=torch.int32, device=device)
    own = rows.index + call.base.shift
    with ThreadPoolExecutor(max(torch.get_num_threads(), 1)) as pool:
        for b in range(batch):
            share = (rows.weight[b] / rows.weight[b].sum().clamp(min=1e-300)).to(dtype)
            for part, keys, seen in _chunks(call, rows, b):
                index = rows.index[b, part]
                surprise = logits(call, b, index, keys, seen).sub_(lse[b, :, index, None])  # log of the weights
                weights = surprise.exp()
                if bool((share[part] == 0).any()):
                    weights = torch.where(share[part, None] > 0, weights, 0.0)  # rows that stand for nothing
                entropy[b, :, part] = -torch.linalg.vecdot(weights, surprise)
                if not call.base.causal:
                    away = (torch.arange(keys.start, keys.stop, device=device) - own[b, part, None]).abs().to(dtype)
                    distance[b, :, part] = torch.linalg.vecdot(weights, away[None])
                received[b, :, keys] += torch.matmul(share[part], weights)
                allowed[b, part] = seen.sum(-1)
                selected[b, :, part] = _select(weights, seen, kv_heads, top, keys.start)
                keys90[b, :, part] = _keys_for_mass(weights, pool)
    return RowFigures(entropy.float(), keys90, distance.float(), allowed, received.float(), selected)


def _chunks(call: AttentionCall, rows: Rows, b: int) -> list[tuple[slice, slice, Tensor]]:
    """Consecutive drawn rows, the range of keys that any of them may see, and which it sees ``(rows, keys)``.

    Layers that share a base mask share the rows, so this is remembered with the mask: R·N booleans per sequence.
    """
    memo = ("lens_rows", b, call.q.shape[1], tuple(rows.index[b].tolist()))
    if memo not in call.base.cache:
        call.base.cache[memo] = list(_make_chunks(call, rows, b))
    return call.base.cache[memo]


def _make_chunks(call: AttentionCall, rows: Rows, b: int) -> Iterator[tuple[slice, slice, Tensor]]:
    base = call.base
    heads, device = call.q.shape[1], call.q.device
    most = budget(device)
    index = rows.index[b]
    lo, hi = base.lo[b % base.lo.shape[0], index], base.hi[b % base.hi.shape[0], index]
    lows, highs = lo.tolist(), hi.tolist()
    start = 0
    while start < len(lows):
        end, low, high = start + 1, lows[start], highs[start]
        while end < len(lows):
            wider = min(low, lows[end]), max(high, highs[end])
            if (end + 1 - start) * heads * (wider[1] - wider[0]) > most:
                break
            (low, high), end = wider, end + 1
        q = index[start:end, None]
        k = torch.arange(low, high, device=device)[None]
        at = torch.full_like(q, b)
        yield slice(start, end), slice(low, high), base.allowed(at, torch.zeros_like(at), q, k)
        start = end


def _select(weights: Tensor, seen: Tensor, kv_heads: int, top: int, first: int) -> Tensor:
    """``(1 + Hkv, rows, top)`` int32."""
    heads, count, width = weights.shape
    per_kv = weights.view(kv_heads, heads // kv_heads, count, width).mean(1)
    sets = torch.cat([per_kv.mean(0, keepdim=True), per_kv]).masked_fill_(~seen, -1.0)  # after every weight, also 0
    found = sets.topk(min(top, width), dim=-1)
    index = torch.where(found.values >= 0, found.indices + first, -1).to(torch.int32)
    return torch.nn.functional.pad(index, (0, top - index.shape[-1]), value=-1)


def _keys_for_mass(weights: Tensor, pool: ThreadPoolExecutor) -> Tensor:
    """``(H, rows)``: the keys that remain when the smallest weights are dropped, as long as they sum to at most 10 %.

    Sorts ``weights`` in place on CPU, where NumPy's vectorised sort is several times faster than torch's.
    """
    if weights.device.type == "cpu":
        flat = weights.view(-1, weights.shape[-1]).numpy()
        parts = np.array_split(flat, max(torch.get_num_threads(), 1))
        list(pool.map(lambda part: part.sort(axis=-1), parts))
        rising = weights
    else:
        rising = weights.sort(-1).values
    sums = rising.cumsum(-1)
    return (sums > (1 - MASS) * sums[..., -1:] + _SLACK).sum(-1)


@torch.no_grad()
def key_weights(call: AttentionCall, lse: Tensor, rows: Rows, keys: Tensor) -> Tensor:
    """Attention of the drawn rows on a few keys per head: keys ``(B, H, m)`` -> ``(B, H, m, R)`` float32."""
    batch, heads, count = keys.shape
    dtype = compute_dtype(call.q.dtype)
    out = torch.zeros(batch, heads, count, rows.index.shape[1], dtype=dtype, device=keys.device)
    kv_head = torch.arange(heads, device=keys.device)[:, None] // call.groups
    for b in range(batch):
        index = rows.index[b]
        q = call.q[b][:, index].to(dtype) * call.scale
        s = torch.bmm(call.k[b][kv_head, keys[b]].to(dtype), q.transpose(1, 2))  # (H, m, R)
        if call.softcap is not None:
            s = call.softcap * torch.tanh(s / call.softcap)
        if call.bias is not None:
            column = relative_index(call, index, keys[b][..., None])
            s = s + call.bias[torch.arange(heads, device=s.device)[:, None, None], column].to(dtype)
        at = torch.full((1, 1, 1), b, device=keys.device)
        seen = call.base.allowed(at, torch.zeros_like(at), index[None, None], keys[b][..., None])
        out[b] = torch.where(seen, torch.exp(s - lse[b, :, None, index]), 0.0)
    return out.float()
