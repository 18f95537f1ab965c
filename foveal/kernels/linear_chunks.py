"""The one product behind linear attention: sums of ``k vᵀ`` met by ``q``, in chunks, forward and backward.

With states ``S (F, D)``, ``sums`` computes for every row ``out_i = q_iᵀ (S₀ + Σ_j k_j v_jᵀ)``, j over all rows, or over ``j ≤ i``
(causal), or over ``j ≥ i`` (causal and reversed), and the state after the last row. Backward is the same product with the
roles exchanged, so only the inputs are kept:

``dq = sums(dout, v, k, S₀ᵀ)``, ``dk = reversed sums(v, dout, q, dS_endᵀ)``, ``dv = reversed sums(k, q, dout, dS_end)``, and the
end state of the last one is ``dS₀``.

Rows are cut into chunks. Inside a chunk pairs are multiplied as a small masked matrix; what lies before it is one state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import compute_dtype
from .pooling import full_precision

CHUNK = 64
"""Rows per chunk: work inside chunks grows with it, the number of states falls with it."""
CPU_SLAB = 1 << 17
"""State and score elements that one step of the loop makes on CPU, so that they stay in the cache."""
GPU_SLAB = 1 << 26
CONVERT_ROWS = 1 << 12
"""Rows converted from half precision at once."""

Product = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
"""``(q, k, v, state, reverse) → (out, end state)``."""


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, state: Tensor, product: Product) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, state)
        ctx.product = product
        with full_precision(q):
            return product(q, k, v, state, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_end: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, state = ctx.saved_tensors
        product: Product = ctx.product
        need_q, need_k, need_v, need_state, _ = ctx.needs_input_grad
        dq = dk = dv = dstate = None
        with full_precision(q):
            if need_q:
                dq, _ = product(grad, v, k, state.mT, False)
            if need_k:
                dk, end = product(v, grad, q, grad_end.mT, True)
                dstate = end.mT
            if need_v or (need_state and dstate is None):
                dv, dstate = product(k, q, grad, grad_end, True)
        return (
            dq if dq is None else dq.to(q.dtype),
            dk if dk is None else dk.to(k.dtype),
            dv if dv is None else dv.to(v.dtype),
            dstate if need_state else None,
            None,
        )


def sums(q: Tensor, k: Tensor, v: Tensor, state: Tensor, product: Product) -> tuple[Tensor, Tensor]:
    """``product`` with gradients to ``q``, ``k``, ``v`` and ``state``; out is in the state's dtype, which is float32 at least."""
    return _Sums.apply(q, k, v, state, product)


def all_rows(q: Tensor, k: Tensor, v: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Every row meets every key.

    Args:
        q: ``(R, Gq, N, F)``. k: ``(R, Gk, M, F)``. v: ``(R, Gk, M, D)``. state: ``(R, F, D)``. reverse: makes no difference.
    """
    end = state
    for part in _parts(k):
        end = end + (k[:, :, part].to(state.dtype).mT @ v[:, :, part].to(state.dtype)).sum(1)
    outs = [q[:, :, part].to(state.dtype) @ end[:, None] for part in _parts(q)]
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)), end


def _parts(x: Tensor) -> list[slice]:
    if x.dtype == compute_dtype(x.dtype) or x.shape[2] <= CONVERT_ROWS:
        return [slice(None)]
    return [slice(i, i + CONVERT_ROWS) for i in range(0, x.shape[2], CONVERT_ROWS)]


def earlier_rows(chunk: int) -> Product:
    """Every row meets itself and the keys before it (after it, when reversed); shapes as in :func:`all_rows`, with M = N."""

    def product(q: Tensor, k: Tensor, v: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        n = q.shape[2]
        size = max(1, min(chunk, n))
        even = n - n % size
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=state.dtype, device=q.device)
        pieces = [(slice(0, even), size)] + ([(slice(even, n), n - even)] if even < n else [])
        for rows, width in pieces[::-1] if reverse else pieces:
            state = _chunks(q[:, :, rows], k[:, :, rows], v[:, :, rows], state, reverse, width, out[:, :, rows])
        return out, state

    return product


def _chunks(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, reverse: bool, width: int, out: Tensor
) -> Tensor:  # fmt: skip
    """Whole chunks of ``width`` rows, written into ``out``; the state after them."""
    if not out.numel():
        return state
    (r, gq, n, f), gk, d, dtype = q.shape, k.shape[1], v.shape[-1], state.dtype
    count = n // width
    state_size, score_size = f * d, gq * gk * width * width
    budget = (CPU_SLAB if q.device.type == "cpu" else GPU_SLAB) // max(state_size, score_size)
    step = max(1, min(count, budget))
    heads = max(1, min(r, budget // step))
    hide = _beyond(width, gq, gk, reverse, q.device)
    end = torch.empty_like(state, memory_format=torch.contiguous_format)
    starts = range(0, count, step)
    for head in range(0, r, heads):
        own = slice(head, head + heads)
        carried = state[own]
        for start in reversed(starts) if reverse else starts:
            rows = slice(start * width, min(start + step, count) * width)
            qc, kc, vc = (_cut(x[own, :, rows].to(dtype), width) for x in (q, k, v))
            flat = qc.shape[0] * qc.shape[1]
            added = torch.bmm(kc.flatten(0, 1).mT, vc.flatten(0, 1)).unflatten(0, qc.shape[:2])
            before, carried = _running(added, carried, reverse)
            scores = torch.bmm(qc.flatten(0, 1), kc.flatten(0, 1).mT).masked_fill_(hide, 0.0)
            if gq == 1 and qc.shape[0] == 1 and out[head, 0].is_contiguous():  # whole rows in place
                place = out[head, 0, rows].view(flat, width, d)
                torch.bmm(qc[0], before.reshape(flat, f, d), out=place)
                place.baddbmm_(scores, vc[0])
                continue
            part = torch.bmm(qc.flatten(0, 1), before.reshape(flat, f, d)).baddbmm_(scores, vc.flatten(0, 1))
            part = part.view(qc.shape[0], -1, gq, width, d)
            out[own, :, rows].unflatten(2, (-1, width)).copy_(part.transpose(1, 2))
        end[own] = carried
    return end


def _running(added: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The state before each chunk (after it, when reversed) ``(R, n, F, D)``, and the one that goes on."""
    n = added.shape[1]
    if n == 1:
        return state[:, None], state + added[:, 0]
    if added.device.type == "cpu":  # a running sum over so few chunks is fastest as a product with a triangle of ones
        ones = added.new_ones(n, n)
        triangle = (ones.triu_(1) if reverse else ones.tril_(-1)).expand(len(added), n, n)
        before = torch.baddbmm(state.flatten(1)[:, None], triangle, added.flatten(2)).view(added.shape)
        last = 0 if reverse else n - 1
        return before, before[:, last] + added[:, last]
    if reverse:
        added = added.flip(1)
    line = torch.cat([state[:, None], added], 1).cumsum(1)
    before = line[:, :-1]
    return (before.flip(1) if reverse else before), line[:, -1]


def _cut(x: Tensor, width: int) -> Tensor:
    """``(R, G, n·width, C)`` as ``(R, n, G·width, C)``."""
    return x.unflatten(2, (-1, width)).transpose(1, 2).flatten(2, 3)


def _beyond(width: int, gq: int, gk: int, reverse: bool, device: torch.device) -> Tensor:
    """``(Gq·width, Gk·width)`` bool: pairs inside a chunk that do not meet."""
    at = torch.arange(width, device=device)
    row, column = at.repeat(gq)[:, None], at.repeat(gk)[None, :]
    return row > column if reverse else row < column
