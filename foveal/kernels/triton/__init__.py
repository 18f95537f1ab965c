"""Triton kernels for GPUs: attention over key lists and ragged groups, which FlexAttention's blocks cannot express.

``TRITON_INTERPRET=1``, set before the first import, runs them on CPU without a compiler, for tests.
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from ...core.layouts import Groups, KeySelection
from ..call import AttentionCall

WIDEST = 256
"""Head dimension that a program's registers hold."""


def interpreted() -> bool:
    """Whether Triton runs its programs on CPU, one operation after the other."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed; torch for CUDA brings it"
    return None if torch.cuda.is_available() or interpreted() else "needs a CUDA GPU"


def refusals(call: AttentionCall) -> list[str]:
    """Reasons why the kernels cannot run the call."""
    reasons, layout = [], call.layout
    if call.q.device.type != "cuda" and not interpreted():
        reasons.append(f"runs on CUDA; the tensors are on {call.q.device.type}")
    if not isinstance(layout, (Groups, KeySelection)):
        name = "dense" if layout is None else f"a {type(layout).__name__}"
        reasons.append(f"takes KeySelection and Groups; the call is {name}, which FlexAttention and SDPA express")
    if call.q.dtype == torch.float64:
        reasons.append("computes in float32 or lower")
    if max(call.q.shape[-1], call.v.shape[-1]) > WIDEST:
        reasons.append(f"takes head dimensions up to {WIDEST}")
    if call.bias is not None:
        reasons.append("takes no relative-position bias")
    if call.base.predicate is not None:
        reasons.append(f"cannot ask the host's own mask about single keys of {type(layout).__name__}")
    if 0 in (call.q.shape[0], call.base.q_len, call.base.kv_len):
        reasons.append("needs at least one sequence, row and key")
    return reasons


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of shapes ``(B, H, Nq, Dv)`` and ``(B, H, Nq)``; a row that sees nothing gives zeros and −inf."""
    from .ops import attend

    return attend(call)
