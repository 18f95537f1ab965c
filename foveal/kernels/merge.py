"""The one place where partial attentions are joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import ShapeError


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attentions over disjoint sets of keys into attention over their union, exactly.

    Args:
        outs: tensors ``(..., Dv)``; lses: tensors ``(...)`` of log-sum-exps, one per out.

    Returns:
        ``(out, lse)``: ``lse = log Σ exp(lse_i)``, ``out = Σ exp(lse_i − lse) out_i``. Differentiable through both. A part
        whose lse is −inf counts for nothing; where all are, out is 0 and lse −inf.

    Raises:
        ShapeError: when the lists differ in length or shape.
    """
    if len(outs) != len(lses) or not outs:
        raise ShapeError(
            f"merge received {len(outs)} outs and {len(lses)} lses; expected the same number, at least one."
        )
    for i, (o, part) in enumerate(zip(outs, lses, strict=True)):
        if o.shape[:-1] != part.shape or part.shape != lses[0].shape:
            raise ShapeError(
                f"merge: outs[{i}] has shape {tuple(o.shape)} and lses[{i}] {tuple(part.shape)}; expected (…, Dv) and (…) = {tuple(lses[0].shape)}."
            )
    weights, lse = shares(torch.stack([part.to(torch.promote_types(part.dtype, torch.float32)) for part in lses]))
    total = sum(o.to(weights.dtype) * w[..., None] for o, w in zip(outs, weights, strict=True))
    assert isinstance(total, Tensor)
    return total.to(outs[0].dtype), lse


def shares(lses: Tensor) -> tuple[Tensor, Tensor]:
    """``(softmax over the first dimension, log-sum-exp without it)``; 0 and −inf where every entry is −inf."""
    top = lses.detach().amax(0)
    safe = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weights = torch.exp(lses - safe)
    norm = weights.sum(0)
    blind = norm == 0
    norm = torch.where(blind, torch.ones_like(norm), norm)
    lse = torch.where(blind, torch.full_like(norm, -torch.inf), torch.log(norm) + safe)
    return weights / norm, lse


def add_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Add a key without a value: ``sink_logits`` ``(H,)`` enter the softmax's sum only (out ``(B, H, N, Dv)``, lse ``(B, H, N)``)."""
    sink = sink_logits.to(lse.dtype)[None, :, None].expand_as(lse)
    return merge([out, torch.zeros_like(out)], [lse, sink])
