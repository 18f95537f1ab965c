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
from ..list_plan import sharing

WIDEST = 256
"""Head dimension that a program's registers hold."""
MOST_LAYERS = 65535
"""Programs along the second axis of a grid."""


def interpreted() -> bool:
    """Whether Triton runs its programs on CPU, one operation after the other."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    if find_spec("triton") is None:
        return "the package triton is not installed; torch for CUDA brings it"
    if interpreted():
        return None
    if not torch.cuda.is_available() or torch.version.hip is not None:  # TF32 products are NVIDIA's
        return "needs an NVIDIA GPU"
    return None


def refusals(call: AttentionCall) -> list[str]:
    """Reasons why the kernels cannot run the call."""
    reasons, layout = [], call.layout
    if call.q.device.type != "cuda" and not interpreted():
        reasons.append(f"runs on CUDA; the tensors are on {call.q.device.type}")
    if not isinstance(layout, (Groups, KeySelection)):
        name = "dense" if layout is None else f"a {type(layout).__name__}"
        reasons.append(f"takes KeySelection and Groups; the call is {name}, which FlexAttention and SDPA express")
    if isinstance(layout, KeySelection) and call.q.shape[0] * sharing(call, layout)[0] > MOST_LAYERS:
        reasons.append(f"takes lists of up to {MOST_LAYERS} sequences times heads")
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
