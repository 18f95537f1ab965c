"""A layer's attention weights, some complete rows at a time: what probes look at, in O(N) memory.

One pass makes everything: the logits of the query heads of one key head for ``R`` rows against every key that these rows may
see, their softmax in float32 (float64 for float64 inputs), and the block is dropped when all probes have seen it. ``R`` follows
from the length: a block is a dozen megabytes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..kernels.call import AttentionCall, compute_dtype, relative_index
from ..kernels.native import unavailable
from ..kernels.native.rows import Products, pack_keys, softmax_rows_
from .kept import Kept
from .scores import LOWEST

CPU_BLOCK = 3 << 20
GPU_BLOCK = 1 << 26
ROUND_ROWS = 64
"""Blocks that are not smaller end at a multiple of this many rows."""


class Span(NamedTuple):
    """Consecutive rows and the keys that any of them may see; ``left`` and ``right`` are the pairs hidden at the two ends."""

    rows: slice
    keys: slice
    left: Tensor
    right: Tensor


@dataclass(eq=False)
class Block:
    """Complete rows of the query heads of one key head.

    Attributes:
        call: of the layer; its layout is not applied to ``weights``. b: sequence of the batch.
        heads: query heads. rows: query rows. keys: the range of keys that some row sees; outside it all weights are 0.
        own: ``(R,)`` key index of every row. position: ``(K,)`` key indices. real: ``(R,)`` bool, False on padding.
        weights: ``(G, R, K)`` attention weights, 0 in rows that are not real. They sum to 1, or less beside a learned sink.
        top, offset: ``(G, R)``: ``log w = logit − top − offset``. spread: ``(G, R)`` sums of weight times ``logit − top``.
        away: ``(G, R)`` sums of weight times distance, and sums: ``(G, K)`` of the weights over rows, where the softmax gave them.
        on_keys: ``(G, R)`` what they sum to; 1 in rows that see nothing, so that one may divide by it.
        policy: what the layer's policy kept, or None when nothing selects.
    """

    call: AttentionCall
    b: int
    heads: slice
    rows: slice
    keys: slice
    own: Tensor
    position: Tensor
    real: Tensor
    weights: Tensor
    top: Tensor
    offset: Tensor
    on_keys: Tensor
    spread: Tensor
    away: Tensor | None
    sums: Tensor | None
    policy: Kept | None
    span: Span
    only_kept: bool
    sink_logits: Tensor | None

    @functools.cached_property
    def log_weights(self) -> Tensor:
        """``(G, R, K)`` the weights' logarithms, finite also where a weight is too small for its type; made anew."""
        s = _logits(self.call, self.b, self.heads.start // self.call.groups, self.span, self.policy, self.only_kept)
        return s - (self.top + self.offset)[..., None]

    def dot(self, vector: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """``(G, R)`` sums of weights times ``vector``, over the block's keys from ``start`` to ``stop``."""
        part = self.weights[..., start:stop]
        if part.is_contiguous():
            return torch.mv(part.flatten(0, 1), vector.to(part.dtype)).view(part.shape[:2])
        return part @ vector.to(part.dtype)

    def columns(self, row_weights: Tensor) -> Tensor:
        """``(G, m, K)`` sums over the rows, weighted by ``(m, R)``."""
        return torch.matmul(row_weights.to(self.weights.dtype), self.weights)

    @functools.cached_property
    def received(self) -> Tensor:
        """``(G, K)`` sums over all rows."""
        return self.weights.sum(1) if self.sums is None else self.sums

    @functools.cached_property
    def distance(self) -> Tensor:
        """``(G, R)`` sums of weights times tokens from row to key, either way."""
        if self.away is not None:
            return self.away
        if not self.call.base.causal:
            return torch.linalg.vecdot(self.weights, self.between.abs().to(self.weights.dtype)[None])
        from_first = self.dot((self.first - self.position).to(self.weights.dtype))  # so that small distances stay exact
        return from_first + (self.own - self.first) * self.on_keys * self.real

    @property
    def first(self) -> int:
        """Key index of the first row."""
        return self.rows.start + self.call.base.shift

    @property
    def last(self) -> int:
        """Key index of the last row."""
        return self.rows.stop - 1 + self.call.base.shift

    @functools.cached_property
    def between(self) -> Tensor:
        """``(R, K)`` int64 tokens from key to row; on keys of the future negative. Small blocks and tails only."""
        return self.own[:, None] - self.position

    @functools.cached_property
    def kept(self) -> Tensor | None:
        """``(G or 1, R, K)`` bool, the pairs that the policy keeps among those the model allows; None when it keeps all."""
        return None if self.policy is None else self.policy.block(self.b, self.heads, self.rows, self.keys)

    def twin(self, b: int) -> Block:
        """The same heads and rows of another sequence of the batch."""
        kv_head = self.heads.start // self.call.groups
        return _block(self.call, self.sink_logits, b, kv_head, self.span, self.policy, self.only_kept)


def blocks(
    call: AttentionCall, sink_logits: Tensor | None = None, policy: Kept | None = None, only_kept: bool = False
) -> Iterator[Block]:
    """All rows of all heads of a call, in rising order of rows within a head; a block is valid until the next one comes.

    Args:
        call: its ``layout`` and ``v`` are not used. sink_logits: ``(H,)`` learned logits of a key without a value.
        policy: what a policy keeps. only_kept: the weights are a softmax over the kept pairs alone.
    """
    call = call.replace(q=call.q.detach(), k=call.k.detach())
    plain = call.softcap is None and call.bias is None and call.base.predicate is None and call.base.valid is None
    pack = _native(call) and plain and not (only_kept and policy is not None) and call.k.numel() > 0
    with _scratch(call) as scratch:
        for b in range(call.q.shape[0]):
            for kv_head in range(call.k.shape[1]):
                packed = pack_keys(call.k[b, kv_head]) if pack else None
                for span in _spans(call, b):
                    yield _block(call, sink_logits, b, kv_head, span, policy, only_kept, scratch, packed)


@contextmanager
def _scratch(call: AttentionCall) -> Iterator[Tensor]:
    """Memory for the call's largest block. On CPU the base mask keeps it for the next layer: between two layers results are laid
    down that stay, and a block that was freed there leaves a hole into which the next one may not fit."""
    every = (s for b in range(call.q.shape[0]) for s in _spans(call, b))
    size = max(((s.rows.stop - s.rows.start) * (s.keys.stop - s.keys.start) for s in every), default=0) * call.groups
    dtype, device = compute_dtype(call.q.dtype), call.q.device
    memo = ("lens_scratch", dtype, device)
    # taken out meanwhile: blocks of another call on the same mask, made at the same time, get their own
    found = call.base.cache.pop(memo, None)
    if found is None or found.numel() < size:
        with torch.inference_mode(False):  # so that later calls in any mode may write into it
            found = torch.empty(size, dtype=dtype, device=device)
    try:
        yield found
    finally:
        if device.type == "cpu":
            call.base.cache[memo] = found


def _native(call: AttentionCall) -> bool:
    return compute_dtype(call.q.dtype) == torch.float32 and call.q.device.type == "cpu" and unavailable() is None


def _spans(call: AttentionCall, b: int) -> list[Span]:
    """Layers that share a base mask share these; the hidden ends are as large as a block is high, so O(N) in all."""
    base = call.base
    most = (CPU_BLOCK if call.q.device.type == "cpu" else GPU_BLOCK) // call.groups
    memo = ("lens_spans", b % base.lo.shape[0], most)
    if memo not in base.cache:
        base.cache[memo] = list(_make_spans(base, b % base.lo.shape[0], most))
    return base.cache[memo]


def _make_spans(base: BaseMask, b: int, most: int) -> Iterator[Span]:
    lo, hi = base.lo[b], base.hi[b]
    lows, highs = lo.tolist(), hi.tolist()
    start = 0
    while start < base.q_len:
        end, low, high = start, base.kv_len, 0
        while end < base.q_len:
            wider = (min(low, lows[end]), max(high, highs[end])) if lows[end] < highs[end] else (low, high)
            if end > start and (end + 1 - start) * (wider[1] - wider[0]) > most:
                break
            (low, high), end = wider, end + 1
        if end < base.q_len and end - start >= ROUND_ROWS:
            end -= end % ROUND_ROWS  # cells of rows that probes sum over tend to end here too
            seen = [n for n in range(start, end) if lows[n] < highs[n]]
            low, high = min((lows[n] for n in seen), default=base.kv_len), max((highs[n] for n in seen), default=0)
        low, high = (low, high) if low < high else (0, 1)  # rows that see nothing still make a block
        first, last = lo[start:end, None], hi[start:end, None]
        inner = min(max(max(lows[start:end]), low), high), max(min(min(highs[start:end]), high), low)
        left = torch.arange(low, inner[0], device=lo.device)
        right = torch.arange(max(inner[1], low), high, device=lo.device)
        hidden = tuple((at < first) | (at >= last) for at in (left, right))
        yield Span(slice(start, end), slice(low, high), *hidden)
        start = end


def real_rows(base: BaseMask, b: int) -> Tensor:
    """``(Nq,)`` bool: rows that are tokens and may see some key."""
    memo = ("lens_real", b % base.batch)
    if memo not in base.cache:
        base.cache[memo] = _real_rows(base, b)
    return base.cache[memo]


def _real_rows(base: BaseMask, b: int) -> Tensor:
    lo, hi = base.lo[b % base.lo.shape[0]], base.hi[b % base.hi.shape[0]]
    if base.valid is None:
        return hi > lo
    valid = base.valid[b % base.valid.shape[0]]
    own = torch.arange(base.q_len, device=base.device) + base.shift
    inside = (own >= 0) & (own < base.kv_len)
    return (hi > lo) & inside & valid[own.clamp(0, base.kv_len - 1)]


def _block(
    call: AttentionCall, sink_logits: Tensor | None, b: int, kv_head: int, span: Span, policy: Kept | None, only_kept: bool,
    scratch: Tensor | None = None, packed: Tensor | None = None,
) -> Block:  # fmt: skip
    """``packed``: keys for the native kernel, which then makes the logits too, in ``scratch``'s memory."""
    rows, keys, groups = span.rows, span.keys, call.groups
    heads = slice(kv_head * groups, (kv_head + 1) * groups)
    native, products = _native(call), None
    away: Tensor | None = None
    sums: Tensor | None = None
    if packed is not None and scratch is not None:
        q = call.q[b, heads, rows].to(torch.float32) * call.scale
        products = Products(q, packed, keys.start)
        width = keys.stop - keys.start
        s = scratch[: groups * q.shape[1] * width].view(groups, q.shape[1], width)
    else:
        s = _logits(call, b, kv_head, span, policy, only_kept, scratch, ends=not native)
    sinks = None if sink_logits is None else sink_logits[heads]
    real = real_rows(call.base, b)[rows]
    if native:
        lo, hi = (x[b % len(x), rows] - keys.start for x in (call.base.lo, call.base.hi))
        if call.base.predicate is not None:  # pairs are hidden one by one
            lo, hi = torch.zeros_like(lo), torch.full_like(hi, s.shape[-1])
        weights, own_column = s, rows.start + call.base.shift - keys.start
        facts = softmax_rows_(s, lo, torch.where(real, hi, lo), sinks, LOWEST / 2, own_column, products)
        top, total, on_keys, spread, away, sums = facts
    else:
        weights, top, total, on_keys, spread = _softmax(s, sinks, real)
    own = torch.arange(rows.start, rows.stop, device=s.device) + call.base.shift
    position = torch.arange(keys.start, keys.stop, device=s.device)
    return Block(
        call, b, heads, rows, keys, own, position, real, weights, top, total.log(), on_keys, spread, away, sums, policy, span, only_kept, sink_logits
    )  # fmt: skip


def _softmax(s: Tensor, sinks: Tensor | None, real: Tensor) -> tuple[Tensor, ...]:
    """Weights, top, total, share on keys and spread as :func:`foveal.kernels.native.rows.softmax_rows_` gives them, for any type and
    device; uses ``s`` up."""
    top = s.amax(-1, keepdim=True).clamp_(min=LOWEST / 2)  # of a row that sees nothing: its weights become 0
    s.sub_(top)
    weights = torch.exp(s)
    total = on_keys = weights.sum(-1)
    if sinks is not None:
        total = on_keys + torch.exp(sinks[:, None].to(s.dtype) - top[..., 0])
    sees = (on_keys > 0) & real
    weights.mul_(torch.where(sees, 1 / total, 0.0)[..., None])
    share = torch.where(sees, on_keys / total, 1.0)
    spread = torch.linalg.vecdot(weights, s)
    return weights, top[..., 0], torch.where(sees, total, 1.0), share, spread


def _logits(
    call: AttentionCall, b: int, kv_head: int, span: Span, policy: Kept | None, only_kept: bool, scratch: Tensor | None = None,
    *, ends: bool = True,
) -> Tensor:  # fmt: skip
    """``(G, R, K)`` with the lowest value on hidden pairs, in ``scratch``'s memory where given; without ``ends`` what the rows'
    bounds hide is left as it is."""
    dtype, device, groups = compute_dtype(call.q.dtype), call.q.device, call.groups
    heads = slice(kv_head * groups, (kv_head + 1) * groups)
    index = torch.arange(span.rows.start, span.rows.stop, device=device)
    position = torch.arange(span.keys.start, span.keys.stop, device=device)
    q = call.q[b, heads, span.rows].to(dtype) * call.scale
    keys = call.k[b, kv_head, span.keys].to(dtype)
    out = None if scratch is None else scratch[: groups * len(index) * len(position)].view(-1, len(position))
    s = torch.mm(q.reshape(-1, q.shape[-1]), keys.T, out=out).view(groups, len(index), -1)
    if call.softcap is not None:
        s.div_(call.softcap).tanh_().mul_(call.softcap)
    if call.bias is not None:
        s += call.bias[heads, relative_index(call, index[:, None], position)].to(dtype)
    _hide(s, call.base, b, span, index, position, ends)
    if only_kept and policy is not None:
        s.masked_fill_(~policy.block(b, heads, span.rows, span.keys), LOWEST)
    return s


def _hide(s: Tensor, base: BaseMask, b: int, span: Span, index: Tensor, position: Tensor, ends: bool) -> None:
    """Give hidden pairs the lowest logit, touching no more of the block than is hidden."""
    if base.predicate is not None:
        at = torch.full((1, 1), b, device=s.device)
        s.masked_fill_(~base.allowed(at, torch.zeros_like(at), index[:, None], position[None]), LOWEST)
        return
    if ends and span.left.shape[1]:
        s[..., : span.left.shape[1]].masked_fill_(span.left, LOWEST)
    if ends and span.right.shape[1]:
        s[..., s.shape[-1] - span.right.shape[1] :].masked_fill_(span.right, LOWEST)
    if base.valid is not None:
        valid = base.valid[b % base.valid.shape[0], span.keys]
        s.add_(torch.zeros_like(position, dtype=s.dtype).masked_fill_(~valid, LOWEST))
