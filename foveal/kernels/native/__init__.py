"""C++ kernels for CPUs: dense, block-sparse and list-sparse attention in float32, bfloat16 and float16.

``docs/native.md`` explains the blocking; the sources are in ``src/native``. The instruction set is chosen when the first
call runs; the environment variable ``FOVEAL_ISA`` (``avx512bf16``, ``avx512``, ``avx2``, ``baseline``) forces one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...core.layouts import Groups, KeySelection
from ..call import AttentionCall

TYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None."""
    try:
        from . import _native
    except ImportError:
        return (
            "needs its C++ part, which is built while foveal is installed: install g++ or clang with C++20, "
            "then reinstall foveal"
        )
    try:
        _native.variant()
    except ValueError as error:
        return f"cannot start: {error}"
    return None


def refusals(call: AttentionCall) -> list[str]:
    """Reasons why the kernels cannot run the call."""
    reasons = []
    if call.q.device.type != "cpu":
        reasons.append(f"runs on CPU; the tensors are on {call.q.device.type}")
    if call.q.dtype not in TYPES:
        reasons.append("computes in float32 or lower")
    if isinstance(call.layout, Groups):
        reasons.append("takes dense calls, BlockMask and KeySelection; the call has Groups")
    if isinstance(call.layout, KeySelection):
        if call.needs_grad:
            reasons.append("has no gradient through a KeySelection")
        if call.base.predicate is not None:
            reasons.append("cannot ask the host's own mask about single keys of a KeySelection")
    if call.bias is not None and call.bias.requires_grad and torch.is_grad_enabled():
        reasons.append("has no gradient for the relative-position bias")
    return reasons


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of shapes ``(B, H, Nq, Dv)`` and ``(B, H, Nq)``; a row that sees nothing gives zeros and −inf."""
    from .ops import attention
    from .plan import visible

    seen = visible(call)
    bias = None if call.bias is None else call.bias.float().contiguous()
    return attention(
        call.q, call.k, call.v, seen.lo, seen.hi, seen.valid, seen.kinds, seen.slot, seen.table, seen.index, bias,
        list(seen.tile), call.scale, call.softcap or 0.0, call.base.shift,
    )  # fmt: skip
