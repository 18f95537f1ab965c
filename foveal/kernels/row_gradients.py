"""The backward pass of every plan: each weight is ``exp(logit − lse)`` again, so that forward keeps nothing but ``out`` and ``lse``."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import compute_dtype
from .rows import LOG2_E, Buffers, Plan, Scores, key_units, logits, pair_products, scratch

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None]


def gradients(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, out: Tensor, lse: Tensor, plan: Plan, scores: Scores,
    grad_out: Tensor, grad_lse: Tensor,
) -> Gradients:  # fmt: skip
    """Of q, k, v and the bias table.

    Args:
        q: ``(rows_q, D)``, k: ``(rows_k, D)``, v: ``(rows_k, Dv)``: what was attended. table: of biases, or None.
        out, lse: what came out: one softmax per row, over all batches in which the row occurs.
        plan: the batches; ``plan.repeats`` says whether a query row may occur in several attentions.
        grad_out, grad_lse: of the results.
    """
    dtype = compute_dtype(q.dtype)
    d, dv = k.shape[1], v.shape[1]
    grad_out = grad_out.contiguous()
    rows_term = upstream_term(grad_out, out, grad_lse.to(dtype)).view(-1, plan.q_unit)
    base2 = (
        lse.masked_fill(lse == -torch.inf, 0.0).mul_(LOG2_E).view(-1, plan.q_unit)
    )  # blind rows: all logits are −inf
    gq, gk, gv = (torch.zeros(t.shape, dtype=dtype, device=q.device) for t in (q, k, v))
    flat_table = None if table is None else table.reshape(-1).to(dtype)
    gt = None if flat_table is None else torch.zeros_like(flat_table)
    qf, gof = q.view(-1, plan.q_unit * d), grad_out.view(-1, plan.q_unit * dv)
    kf, vf = key_units(k, v, plan, dtype)
    gqf, gkf, gvf = gq.view(-1, plan.q_unit * d), gk.view(-1, plan.k_unit * d), gv.view(-1, plan.k_unit * dv)
    with scratch(q.device) as buffers:
        for batch in plan.batches():
            r = batch.q_rows.shape[0]
            where, source = batch.q_rows.reshape(-1), batch.k_rows.reshape(-1)
            qg = buffers.take("q", qf, batch.q_rows, dtype, d, batch.run)
            kg = buffers.take("k", kf, batch.k_rows, dtype, d)
            vg = buffers.take("v", vf, batch.k_rows, dtype, dv)
            go = buffers.take("grad_out", gof, batch.q_rows, dtype, dv, batch.run)
            s, tanh = logits(buffers, qg, kg, batch, scores, flat_table, base2[where].view(r, -1, 1))
            p = s.exp2_()
            part = torch.bmm(p.transpose(1, 2), go, out=_like(buffers, "grad_v", vg))
            gvf.index_add_(0, source, part.view(source.shape[0], -1))
            ds = _like(buffers, "grad_scores", s)
            pair_products(go, vg, ds, start=rows_term[where].view(r, -1, 1)).mul_(p)
            if gt is not None and batch.bias is not None:
                gt.index_add_(0, batch.bias.expand(ds.shape).reshape(-1), ds.reshape(-1))
            if tanh is not None:
                ds.mul_(tanh.square_().neg_().add_(1))
            part = _like(buffers, "grad_q", qg) if batch.run is None else gqf[batch.run].view(qg.shape)
            torch.baddbmm(part, ds, kg, beta=0 if batch.first else 1, alpha=scores.scale, out=part)
            if batch.run is None and batch.last:
                write = gqf.index_add_ if plan.repeats else gqf.index_copy_
                write(0, where, part.view(where.shape[0], -1))
            part = _like(buffers, "grad_k", kg)
            torch.baddbmm(part, ds.transpose(1, 2), qg, beta=0, alpha=scores.scale, out=part)
            gkf.index_add_(0, source, part.view(source.shape[0], -1))
    table_grad = None if gt is None or table is None else gt.view(table.shape).to(table.dtype)
    return gq.to(q.dtype), gk.to(k.dtype), gv.to(v.dtype), table_grad


def _like(buffers: Buffers, role: str, x: Tensor) -> Tensor:
    return buffers.get(role, tuple(x.shape), x.dtype)


def upstream_term(grad_out: Tensor, out: Tensor, grad_lse: Tensor, rows: int = 1 << 13) -> Tensor:
    """``d lse − d out·out`` per row: what enters the gradient of every logit of the row with the weight of its pair."""
    term = torch.empty_like(grad_lse)
    for i in range(0, term.shape[0], rows):
        part = slice(i, i + rows)
        product = grad_out[part].to(term.dtype) * out[part]
        torch.sub(grad_lse[part], product.sum(-1), out=term[part])
    return term
