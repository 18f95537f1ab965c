"""Which rows need no maximum: their logits are so small that ``exp2`` of them can be taken as they are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .call import AttentionCall, compute_dtype
from .rows import LOG2_E, Plan

UNSHIFTED = 64.0
"""Base-2 logits of at most this size are weighted as they are: 2^±64 leaves float32 as much room again for sums and values."""
LARGEST_VALUE = 2.0**32


def unshifted_rows(call: AttentionCall, plan: Plan) -> Tensor | bool:
    """``(B, H, Nq)`` bool, or the same answer for all rows.

    By Cauchy-Schwarz no logit of a row is larger than its query times the longest key. Only keys before the end of what the row may
    see count, and none that are padding, so that neither later keys nor padding decide how it is rounded. False where the call has a
    bias; where keys are read less than about once (their lengths would cost more than the maxima); on a GPU, which would
    have to wait for the answer.
    """
    base = call.base
    if call.bias is not None or call.q.device.type != "cpu" or plan.key_reads < math.prod(call.k.shape[:3]):
        return False
    q, k, v = (
        torch.linalg.vector_norm(x.detach(), dim=-1, dtype=compute_dtype(x.dtype)) for x in (call.q, call.k, call.v)
    )
    if base.valid is not None:
        k, v = (x.where(base.valid[:, None], 0.0) for x in (k, v))
    factor = abs(call.scale) * LOG2_E
    cap = math.inf if call.softcap is None else abs(call.softcap) * LOG2_E
    if min(factor * float(q.max()) * float(k.max()), cap) <= UNSHIFTED and float(v.max()) <= LARGEST_VALUE:
        return True  # comparisons with NaN are false
    last = (base.hi.clamp(min=1, max=base.kv_len) - 1)[:, None].expand(*k.shape[:2], -1)
    k, v = (x.cummax(-1).values.gather(-1, last).repeat_interleave(call.groups, 1) for x in (k, v))
    return ((factor * q * k).clamp(max=cap) <= UNSHIFTED) & (v <= LARGEST_VALUE)
