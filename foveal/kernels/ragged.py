"""The one inner loop of ``gather``: many small attentions of gathered rows, forward and backward, in O(N) memory.

A *plan* is a sequence of batches. In each batch, R small attentions run at once: attention ``r`` takes the query rows
``q_rows[r]`` and the key rows ``k_rows[r]`` (in units of ``q_unit`` and ``k_unit`` consecutive rows of the flattened
tensors), hides the pairs that ``hide`` names, and writes its output back to the same query rows. Scores of one batch live
in a reused buffer that fits the cache; nothing is kept for backward but ``out`` and ``lse``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import compute_dtype


@dataclass(frozen=True, eq=False)
class Batch:
    """R small attentions of the same shape.

    Attributes:
        q_rows: ``(R, M/q_unit)`` int64 row units of the flattened q; every row is written by at most one attention.
        k_rows: ``(R, L/k_unit)`` int64 row units of the flattened k and v.
        hide: None, or ``(first_column, mask)``: ``mask`` is ``(R, M, L − first_column)`` or broadcastable, True hides.
        bias: None, or ``(R, M, L)`` indices into the flattened bias table.
    """

    q_rows: Tensor
    k_rows: Tensor
    hide: tuple[int, Tensor] | None = None
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Batches, made afresh each time they are walked so that masks never pile up, and the sizes of a row unit."""

    batches: Callable[[], Iterator[Batch]]
    q_unit: int = 1
    k_unit: int = 1


@dataclass(frozen=True)
class Scores:
    """How logits are made: ``bias + softcap·tanh(scale·q·k / softcap)``."""

    scale: float
    softcap: float | None = None


class _Buffers:
    """Scratch memory, reused between batches of one pass (batches differ in size, never in role)."""

    def __init__(self) -> None:
        self._store: dict[str, Tensor] = {}

    def get(self, role: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        size = 1
        for s in shape:
            size *= s
        flat = self._store.get(role)
        if flat is None or flat.numel() < size:
            flat = self._store[role] = torch.empty(size, dtype=dtype, device=like.device)
        return flat[:size].view(shape)


def _take(buffers: _Buffers, role: str, source: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of ``source`` ``(units, unit·C)`` as ``(R, units·unit, C)`` in the compute dtype."""
    count, width = rows.numel(), source.shape[1]
    out = buffers.get(role, (count, width), source, source.dtype)
    torch.index_select(source, 0, rows.reshape(-1), out=out)
    return out if source.dtype == dtype else out.to(dtype)


def _logits(buffers: _Buffers, qg: Tensor, kg: Tensor, batch: Batch, scores: Scores, table: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Masked logits ``(R, M, L)`` and, under a softcap, the tanh needed by backward."""
    shape = (qg.shape[0], qg.shape[1], kg.shape[1])
    s = buffers.get("scores", shape, qg, qg.dtype)
    torch.baddbmm(s, qg, kg.transpose(1, 2), beta=0, alpha=scores.scale, out=s)
    tanh = None
    if scores.softcap is not None:
        s.div_(scores.softcap).tanh_()
        tanh = s.clone()
        s.mul_(scores.softcap)
    if batch.bias is not None and table is not None:
        s.add_(table[batch.bias])
    if batch.hide is not None:
        first, mask = batch.hide
        s[:, :, first:].masked_fill_(mask, -torch.inf)
    return s, tanh


def _softmax(buffers: _Buffers, s: Tensor, hidden: bool) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp; a row with no visible key gets weights 0 and lse −inf."""
    top = s.amax(-1, keepdim=True)
    p = buffers.get("weights", tuple(s.shape), s, s.dtype)
    torch.softmax(s, -1, out=p)
    lse = top - p.amax(-1, keepdim=True).log_()  # the largest weight is exp(top − lse)
    if hidden:
        blind = torch.isinf(top) & (top < 0)
        if bool(blind.any()):
            p.masked_fill_(blind, 0.0)
            lse.masked_fill_(blind, -torch.inf)
    return p, lse


def _units(rows: Tensor, unit: int) -> Tensor:
    """``(R, C)`` or ``(R,)`` as ``(R/unit, unit·C)``, also when R is 0."""
    return rows.view(rows.shape[0] // unit, unit * math.prod(rows.shape[1:]))


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, plan: Plan, scores: Scores) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(q.dtype)
        d, dv = k.shape[1], v.shape[1]
        out = torch.zeros(q.shape[0], dv, dtype=q.dtype, device=q.device)
        lse = torch.full((q.shape[0],), -torch.inf, dtype=dtype, device=q.device)
        qf, of, lf = _units(q, plan.q_unit), _units(out, plan.q_unit), _units(lse, plan.q_unit)
        kf, vf = _units(k, plan.k_unit), _units(v, plan.k_unit)
        flat_table = None if table is None else table.reshape(-1).to(dtype)
        buffers = _Buffers()
        for batch in plan.batches():
            r = batch.q_rows.shape[0]
            qg = _take(buffers, "q", qf, batch.q_rows, dtype).view(r, -1, d)
            kg = _take(buffers, "k", kf, batch.k_rows, dtype).view(r, -1, d)
            vg = _take(buffers, "v", vf, batch.k_rows, dtype).view(r, -1, dv)
            s, _ = _logits(buffers, qg, kg, batch, scores, flat_table)
            p, part = _softmax(buffers, s, batch.hide is not None)
            og = buffers.get("out", (r, qg.shape[1], dv), qg, dtype)
            torch.bmm(p, vg, out=og)
            where = batch.q_rows.reshape(-1)
            of.index_copy_(0, where, og.view(where.numel(), -1).to(q.dtype))
            lf.index_copy_(0, where, part.view(where.numel(), -1))
        ctx.save_for_backward(q, k, v, table, out, lse)
        ctx.plan, ctx.scores = plan, scores
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, out, _ = ctx.saved_tensors
        plan, scores = ctx.plan, ctx.scores
        dtype = compute_dtype(q.dtype)
        d, dv = k.shape[1], v.shape[1]
        # d lse enters every logit's gradient with the same weight as the row's own correction term
        rows_term = _units(grad_lse.to(dtype) - (grad_out.to(dtype) * out.to(dtype)).sum(-1), plan.q_unit)
        gq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        gk = torch.zeros(k.shape, dtype=dtype, device=q.device)
        gv = torch.zeros(v.shape, dtype=dtype, device=q.device)
        flat_table = None if table is None else table.reshape(-1).to(dtype)
        gt = None if flat_table is None else torch.zeros_like(flat_table)
        qf, gof = _units(q, plan.q_unit), _units(grad_out.contiguous(), plan.q_unit)
        kf, vf = _units(k, plan.k_unit), _units(v, plan.k_unit)
        gqf, gkf, gvf = _units(gq, plan.q_unit), _units(gk, plan.k_unit), _units(gv, plan.k_unit)
        buffers = _Buffers()
        for batch in plan.batches():
            r = batch.q_rows.shape[0]
            where, source = batch.q_rows.reshape(-1), batch.k_rows.reshape(-1)
            qg = _take(buffers, "q", qf, batch.q_rows, dtype).view(r, -1, d)
            kg = _take(buffers, "k", kf, batch.k_rows, dtype).view(r, -1, d)
            vg = _take(buffers, "v", vf, batch.k_rows, dtype).view(r, -1, dv)
            go = _take(buffers, "grad_out", gof, batch.q_rows, dtype).view(r, -1, dv)
            s, tanh = _logits(buffers, qg, kg, batch, scores, flat_table)
            p, _ = _softmax(buffers, s, batch.hide is not None)
            part = buffers.get("grad_v", tuple(vg.shape), vg, dtype)
            torch.bmm(p.transpose(1, 2), go, out=part)
            gvf.index_add_(0, source, part.view(source.numel(), -1))
            ds = torch.bmm(go, vg.transpose(1, 2), out=s)
            ds.add_(rows_term[where].view(r, -1, 1)).mul_(p)
            if gt is not None and batch.bias is not None:
                gt.index_add_(0, batch.bias.expand(ds.shape).reshape(-1), ds.reshape(-1))
            if tanh is not None:
                ds.mul_(1 - tanh.square_())
            part = buffers.get("grad_q", tuple(qg.shape), qg, dtype)
            torch.baddbmm(part, ds, kg, beta=0, alpha=scores.scale, out=part)
            gqf.index_copy_(0, where, part.view(where.numel(), -1))
            part = buffers.get("grad_k", tuple(kg.shape), kg, dtype)
            torch.baddbmm(part, ds.transpose(1, 2), qg, beta=0, alpha=scores.scale, out=part)
            gkf.index_add_(0, source, part.view(source.numel(), -1))
        table_grad = None if gt is None or table is None else gt.view(table.shape).to(table.dtype)
        return gq.to(q.dtype), gk.to(k.dtype), gv.to(v.dtype), table_grad, None, None


def attend_rows(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scores: Scores, table: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a plan over flattened rows.

    Args:
        q: ``(rows_q, D)``, k: ``(rows_k, D)``, v: ``(rows_k, Dv)``.
        plan: which rows meet.
        scores: scale and softcap.
        table: flattened by the plan's bias indices; gradients flow to it.

    Returns:
        ``out`` ``(rows_q, Dv)`` in q's dtype and ``lse`` ``(rows_q,)`` in the compute dtype; rows of no batch give 0 and −inf.
    """
    return _Ragged.apply(q.contiguous(), k.contiguous(), v.contiguous(), table, plan, scores)


def split_rows(total: int, score_elements: int, budget: int) -> Iterable[slice]:
    """Slices of ``range(total)`` so that each holds at most ``budget`` score elements (at least one row)."""
    step = max(1, budget // max(score_elements, 1))
    return (slice(i, min(i + step, total)) for i in range(0, total, step))
