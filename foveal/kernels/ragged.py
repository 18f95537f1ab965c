"""The one inner loop of ``gather``: many small attentions of gathered rows, forward and backward, in O(N) memory.

Every row of q takes part in at most one attention of the plan (see ``kernels.rows``), and the output goes back to its place.
``kernels.merged`` is for rows that take part in many.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import compute_dtype
from .row_gradients import gradients
from .rows import LOG2_E, Batch, Plan, Scores, key_units, logits, scratch


class _Ragged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, plan: Plan, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(q.dtype)
        d, dv = k.shape[1], v.shape[1]
        out = (torch.empty if plan.covers else torch.zeros)(q.shape[0], dv, dtype=q.dtype, device=q.device)
        lse = torch.zeros(q.shape[0], dtype=dtype, device=q.device)  # sums of weights, until all are there
        plain = plan.plain if isinstance(plan.plain, bool) else plan.plain.view(-1, plan.q_unit)
        top = None if plain is True else torch.full_like(lse, -torch.inf)
        qf, of, lf = q.view(-1, plan.q_unit * d), out.view(-1, plan.q_unit * dv), lse.view(-1, plan.q_unit)
        tf = None if top is None else top.view(-1, plan.q_unit)
        kf, vf = key_units(k, v, plan, dtype)
        flat_table = None if table is None else table.reshape(-1).to(dtype)
        tiny = torch.finfo(dtype).tiny
        here, norm, og = lse, lse, out  # of the rows at hand, over all parts of their keys
        with scratch(q.device) as buffers:
            for batch in plan.batches():
                in_place = batch.run is not None and q.dtype == dtype
                qg = buffers.take("q", qf, batch.q_rows, dtype, d, batch.run)
                kg = buffers.take("k", kf, batch.k_rows, dtype, d)
                s, _ = logits(buffers, qg, kg, batch, scores, flat_table)
                if tf is not None:
                    before, here = here, s.amax(-1, keepdim=True)
                    if isinstance(plain, Tensor):
                        here.masked_fill_(plain[batch.q_rows].view(here.shape), 0.0)
                    if not batch.first:
                        torch.maximum(here, before, out=here)
                    # a row that sees nothing gets weights 0, not NaN
                    s.sub_(here.masked_fill(here == -torch.inf, 0.0) if batch.hides else here)
                share = s.exp2_().sum(-1, keepdim=True)
                vg = buffers.take(
                    "k", vf, batch.k_rows, dtype, dv
                )  # where the keys were, which are done with: less to keep in the cache
                if batch.first:
                    norm, shape = share, (*qg.shape[:2], dv)
                    og = of[batch.run].view(shape) if in_place else buffers.get("out", shape, dtype)
                    torch.bmm(s, vg, out=og)
                else:
                    if tf is not None:
                        before.sub_(here).exp2_().nan_to_num_(0.0)  # −inf less −inf: nothing was seen yet
                        norm.mul_(before)
                        og.mul_(before)
                    norm.add_(share)
                    torch.baddbmm(og, s, vg, out=og)
                if batch.last:
                    if tf is not None:
                        _put(tf, batch, here)
                    _put(lf, batch, norm)
                    og.div_(norm.clamp_(min=tiny) if batch.hides else norm)
                    if not in_place:
                        _put(of, batch, og)
        lse.log2_()
        lse = (lse if top is None else lse.add_(top)).mul_(1 / LOG2_E)
        ctx.save_for_backward(q, k, v, table, out, lse)
        ctx.plan, ctx.scores = plan, scores
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, out, lse = ctx.saved_tensors
        found = gradients(q, k, v, table, out, lse, ctx.plan, ctx.scores, grad_out, grad_lse)
        return *found, None, None


def _put(target: Tensor, batch: Batch, found: Tensor) -> None:
    """Write what a batch gave, ``(R, M, C)``, to its rows of ``target`` ``(all_units, unit·C)``."""
    found = found.view(-1, target.shape[1])
    if batch.run is not None:
        target[batch.run].copy_(found)
    else:
        target.index_copy_(0, batch.q_rows.reshape(-1), found.to(target.dtype))


def attend_rows(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scores: Scores, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
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
