"""Attentions of the same query row, merged while they run: ``Groups`` whose memory does not grow with the memberships.

As ``kernels.ragged``, but a query row may take part in many attentions of a plan. What they give is added up under a
running maximum, so that the result is one softmax over the union. Backward is that of any plan, with the merged lse.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .call import compute_dtype
from .row_gradients import gradients
from .rows import LOG2_E, Plan, Scores, key_units, logits, scratch


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, plan: Plan, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(q.dtype)
        d, dv = k.shape[1], v.shape[1]
        total = torch.zeros(q.shape[0], dv, dtype=dtype, device=q.device)
        top = torch.full((q.shape[0],), -torch.inf, dtype=dtype, device=q.device)
        norm = torch.zeros_like(top)
        kf, vf = key_units(k, v, plan, dtype)
        flat_table = None if table is None else table.reshape(-1).to(dtype)
        plain = plan.plain
        with scratch(q.device) as buffers:
            for batch in plan.batches():
                qg = buffers.take("q", q, batch.q_rows, dtype, d)
                kg = buffers.take("k", kf, batch.k_rows, dtype, d)
                s, _ = logits(buffers, qg, kg, batch, scores, flat_table)
                where = batch.q_rows.reshape(-1)
                if plain is True:
                    norm.index_add_(0, where, s.exp2_().sum(-1).view(-1))
                    vg = buffers.take("k", vf, batch.k_rows, dtype, dv)  # where the keys were, which are done with
                    part = torch.bmm(s, vg, out=buffers.get("out", (qg.shape[0], qg.shape[1], dv), dtype))
                    total.index_add_(0, where, part.view(-1, dv))
                    continue
                here = s.amax(-1, keepdim=True)
                if isinstance(plain, Tensor):
                    here.masked_fill_(plain[batch.q_rows][..., None], 0.0)
                before = top.index_select(0, where)
                top.scatter_reduce_(0, where, here.view(-1), "amax")
                now = top.index_select(0, where)
                s.sub_(here.masked_fill(here == -torch.inf, 0.0)).exp2_()
                share = s.sum(-1).view(-1)
                vg = buffers.take("k", vf, batch.k_rows, dtype, dv)
                part = torch.bmm(s, vg, out=buffers.get("out", (qg.shape[0], qg.shape[1], dv), dtype)).view(-1, dv)
                _rescale(total, norm, where, before, now)
                factor = (here.view(-1) - now.masked_fill(now == -torch.inf, 0.0)).exp2_()
                total.index_add_(0, where, part.mul_(factor[:, None]))
                norm.index_add_(0, where, share.mul_(factor))
        out = total.div_(norm.clamp(min=torch.finfo(dtype).tiny)[:, None]).to(q.dtype)
        lse = norm.log2_() if plain is True else norm.log2_().add_(top)
        lse.mul_(1 / LOG2_E)
        ctx.save_for_backward(q, k, v, table, out, lse)
        ctx.plan, ctx.scores = plan, scores
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, table, out, lse = ctx.saved_tensors
        found = gradients(q, k, v, table, out, lse, ctx.plan, ctx.scores, grad_out, grad_lse)
        return *found, None, None


def _rescale(total: Tensor, norm: Tensor, where: Tensor, before: Tensor, now: Tensor) -> None:
    """Bring the rows whose maximum rose to the new one. A row that occurs twice is written twice, with the same values."""
    rose = ((now > before) & (before > -torch.inf)).nonzero()[:, 0]
    if rose.numel():
        rows, factor = where[rose], (before[rose] - now[rose]).exp2_()
        total.index_copy_(0, rows, total.index_select(0, rows).mul_(factor[:, None]))
        norm.index_copy_(0, rows, norm.index_select(0, rows).mul_(factor))


def attend_merged(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scores: Scores, table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run a plan with ``q_unit`` and ``k_unit`` 1 in which a query row may occur any number of times.

    Args and returns as :func:`foveal.kernels.ragged.attend_rows`.
    """
    return _Merged.apply(q.contiguous(), k.contiguous(), v.contiguous(), table, plan, scores)
