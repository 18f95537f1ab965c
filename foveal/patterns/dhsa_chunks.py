"""The chunk form of DHSA (arXiv 2510.24606, v1): chunks of varying length, scored whole, copied down to tokens.

With k̄_c = √n_c · mean of the keys of chunk c, and q̄_u the mean query of block u (a positive factor √n_u would not change its
ranking): S[u, c] = q̄_u · k̄_c, every token has its chunk's score, and block u keeps its last ``local`` tokens, the first
``sinks`` and the best others up to N_b. Tokens of equal score are taken in order, so a chunk is taken from its start.

Positions here are *ranks*: the number of real keys before a key, so that padding takes no part and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import BaseMask
from ..core.layouts import KeySelection
from ..kernels.call import compute_dtype
from ..kernels.pooling import filled_keys, keys_before, mean_rows, pooled_scores, real_rows

Pooling = Literal["avgpool", "avgpool_norm", "maxpool"]
NONE = 1 << 60
"""First rank of a chunk that does not exist."""


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks of a request, the state of the pattern; never changed in place.

    Attributes:
        first: ``(B or 1, C)`` int64 ascending first ranks, ``NONE`` beyond a row's last chunk; chunk c ends where c+1 starts.
        pooled: ``(B, 1 or Hkv, C, D)`` sums of keys (``maxpool``: maxima), float32, or float64 for float64 keys.
        absorbed: keys pooled so far.
        origin: rank of key 0 in each sequence; moves when a rolling cache drops keys.
        rule: what the boundaries depend on; layers share boundaries only under the same rule.
    """

    first: Tensor
    pooled: Tensor
    absorbed: int
    origin: tuple[int, ...]
    rule: tuple[object, ...]


def chunk_index(first: Tensor, base: BaseMask) -> Tensor:
    """``(B or 1, kv_len)`` int64 chunk of every key: the one that starts at it or last before it; 0 for padding before all."""
    rank = keys_before(base)[:, :-1]
    rows = max(first.shape[0], rank.shape[0])
    found = torch.searchsorted(first.expand(rows, -1).contiguous(), rank.expand(rows, -1).contiguous(), right=True) - 1
    return found.clamp(min=0)


def head_mean(k: Tensor, per_head: bool) -> Tensor:
    """Keys for pooling: all KV heads, or their mean as one."""
    k = k.to(compute_dtype(k.dtype))
    return k if per_head else k.mean(1, keepdim=True)


def pool_chunks(k: Tensor, first: Tensor, base: BaseMask, pooling: Pooling) -> Tensor:
    """``(B, H, C, D)`` sums or maxima of ``(B, H, kv_len, D)`` over the real keys of each chunk."""
    index = chunk_index(first, base).expand(k.shape[0], -1)
    real = torch.arange(base.kv_len, device=k.device)[None] < filled_keys(base)
    if base.valid is not None:
        real = real & base.valid
    count = first.shape[1]
    index = torch.where(real, index, count)[:, None, :, None].expand(k.shape)
    empty = k.new_full((*k.shape[:2], count + 1, k.shape[3]), -torch.inf if pooling == "maxpool" else 0.0)
    out = empty.scatter_reduce(
        2, index, torch.where(real[:, None, :, None], k, 0.0), "amax" if pooling == "maxpool" else "sum"
    )
    return out[:, :, :count]


def chunk_vectors(chunks: Chunks, length: Tensor, pooling: Pooling) -> Tensor:
    """``(B, H, C, D)`` k̄; ``length`` is ``(B or 1, C)`` keys per chunk. Chunks without a key give zeros."""
    n = length.clamp(min=1)[:, None, :, None]
    if pooling == "maxpool":
        return torch.where(length[:, None, :, None] > 0, chunks.pooled, 0.0)
    return chunks.pooled / (n.to(chunks.pooled.dtype).sqrt() if pooling == "avgpool_norm" else n)


def chunk_lengths(first: Tensor, total: Tensor) -> Tensor:
    """``(B, C)`` real keys per chunk, when ``total`` ``(B,)`` real keys exist."""
    edges = torch.minimum(torch.cat([first, torch.full_like(first[:, :1], NONE)], -1), total[:, None])
    return edges.diff(dim=-1)


@dataclass(frozen=True, eq=False)
class Spans:
    """For every query block, in ranks: ``[allowed, sinks_end)`` are sinks, ``[tail, end)`` is kept whole, between them
    chunks compete for ``room`` tokens. All ``(B or 1, nqb)`` int64."""

    allowed: Tensor
    sinks_end: Tensor
    tail: Tensor
    end: Tensor
    room: Tensor


def spans(
    base: BaseMask, q_block: int, local: int, sinks: int, dense_rows: int, keys: Tensor | float, share: bool
) -> Spans:
    """Which keys each query block keeps in any case.

    Args:
        base: the model's mask.
        q_block: rows per list.
        local: tokens at the block's end that are kept, at least the block's own.
        sinks: first tokens (of the window, where the model has one) that are kept.
        dense_rows: last rows that are no padding; their blocks keep everything.
        keys: N_b, or its share of the keys that the block may see when ``share``.
    """
    nqb = -(-base.q_len // q_block)
    extra = nqb * q_block - base.q_len
    before = keys_before(base)
    blind = base.lo >= base.hi

    def blocks(x: Tensor, fill_with: int) -> Tensor:
        return pad(x, (0, extra), value=fill_with).unflatten(-1, (-1, q_block))

    lo = blocks(torch.where(blind, base.kv_len, base.lo), base.kv_len).amin(-1)
    hi = blocks(torch.where(blind, 0, base.hi), 0).amax(-1)
    lo = torch.minimum(lo, hi)
    real = real_rows(base)
    rows = max(before.shape[0], lo.shape[0], real.shape[0])
    before, lo, hi = before.expand(rows, -1), lo.expand(rows, -1), hi.expand(rows, -1)
    allowed, end = before.gather(1, lo), before.gather(1, hi)
    own = blocks(real.long(), 0).sum(-1)
    tail = torch.maximum(allowed, end - own.clamp(min=local))
    if dense_rows:
        from_end = real.long().flip(-1).cumsum(-1).flip(-1)
        dense = blocks((real & (from_end <= dense_rows)).long(), 0).any(-1)
        tail = torch.where(dense, allowed, tail)
    sinks_end = torch.minimum(allowed + sinks, tail)
    budget = torch.floor((end - allowed) * keys + 1e-9) if share else torch.full_like(end, int(keys))
    room = (budget - (end - tail) - (sinks_end - allowed)).clamp(min=0)
    return Spans(allowed, sinks_end, tail, end, room.long())


def tokens_per_chunk(scores: Tensor, first: Tensor, length: Tensor, span: Spans) -> Tensor:
    """``(B, H, nqb, C)`` int64: how many tokens each block takes of each chunk, best chunks first, the last one in part."""
    start, stop = first[:, None], (first.clamp(max=NONE - 1) + length)[:, None]
    weight = torch.minimum(stop, span.tail[..., None]) - torch.maximum(start, span.sinks_end[..., None])
    weight = torch.where(length[:, None] > 0, weight, 0).clamp(min=0)[:, None].expand(scores.shape)
    order = torch.where(weight > 0, scores, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    sorted_weight = weight.gather(-1, order)
    free = span.room[:, None, :, None] - (sorted_weight.cumsum(-1) - sorted_weight)
    taken = torch.minimum(sorted_weight, free.clamp(min=0))
    return torch.zeros_like(taken).scatter(-1, order, taken)


def key_lists(taken: Tensor, first: Tensor, span: Spans, base: BaseMask, elements: int = 1 << 22) -> Tensor:
    """``(B, H, nqb, K)`` ascending key indices, −1 at the end; built in slices of query blocks so that memory stays O(N)."""
    batch, heads, nqb, _ = taken.shape
    rank = keys_before(base)[:, :-1]
    chunk = chunk_index(first, base)
    start = first.expand(chunk.shape[0], -1).gather(1, chunk)
    real = torch.arange(base.kv_len, device=rank.device)[None] < filled_keys(base)
    if base.valid is not None:
        real = real & base.valid
    step = max(1, elements // max(1, batch * heads * base.kv_len))
    parts = []
    for u in range(0, nqb, step):
        part = slice(u, u + step)
        a, g, t, e = (x[:, part, None] for x in (span.allowed, span.sinks_end, span.tail, span.end))
        r = rank[:, None]
        inside = (r >= a) & (r < e) & real[:, None]
        sure = inside & ((r < g) | (r >= t))
        place = (r - torch.maximum(start[:, None], g))[:, None]
        quota = taken[:, :, part].gather(-1, chunk[:, None, None].expand(batch, heads, taken[:, :, part].shape[2], -1))
        kept = sure[:, None] | (inside[:, None] & (place >= 0) & (place < quota))
        parts.append(_lists(kept))
    width = max((p.shape[-1] for p in parts), default=0)
    return torch.cat([pad(p, (0, width - p.shape[-1]), value=-1) for p in parts], 2)


def _lists(kept: Tensor) -> Tensor:
    flat = kept.flatten(0, 2)
    count = flat.sum(-1)
    row, key = flat.nonzero(as_tuple=True)
    place = torch.arange(row.numel(), device=row.device) - (count.cumsum(0) - count)[row]
    out = torch.full((flat.shape[0], int(count.max()) if count.numel() else 0), -1, device=row.device)
    out[row, place] = key
    return out.view(*kept.shape[:3], -1)


def select_chunks(
    q: Tensor, chunks: Chunks, base: BaseMask, q_block: int, pooling: Pooling, span: Spans
) -> KeySelection:
    """Score, copy down, choose: the lists of every query block. ``chunks.pooled`` with one head means one list for all."""
    total = keys_before(base)[:, filled_keys(base)]
    rows = max(chunks.first.shape[0], total.shape[0])
    first, total = chunks.first.expand(rows, -1), total.expand(rows)
    length = chunk_lengths(first, total)
    q = q if chunks.pooled.shape[1] > 1 or q.shape[1] == 1 else q.to(compute_dtype(q.dtype)).mean(1, keepdim=True)
    scores = pooled_scores(mean_rows(q, q_block, real_rows(base)), chunk_vectors(chunks, length, pooling))
    taken = tokens_per_chunk(scores, first, length, span)
    return KeySelection(key_lists(taken, first, span, base), q_block)
