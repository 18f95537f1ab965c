"""C++ kernels for CPUs: dense, block-sparse, list-sparse and ragged attention in float32, bfloat16 and float16.

``docs/native.md`` explains the blocking; the sources are in ``src/native``. The instruction set is chosen when the first
call runs; the environment variable ``FOVEAL_ISA`` (``amx``, ``avx512bf16``, ``avx512``, ``avx2``, ``baseline``) forces one.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedError
from ...core.layouts import Groups, KeySelection
from ..call import AttentionCall
from ..group_plan import average

DOORS = ("forward", "backward", "softmax_rows", "pack_keys", "tile_kinds", "linear")
"""What the C++ part must offer; a build of older sources does not."""
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
    if missing := [name for name in DOORS if not hasattr(_native, name)]:
        return f"was built from older sources, which have no {missing[0]}: reinstall foveal"
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
    if isinstance(call.layout, (Groups, KeySelection)) and call.base.predicate is not None:
        reasons.append(f"cannot ask the host's own mask about single keys of {type(call.layout).__name__}")
    return reasons


def attend(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of shapes ``(B, H, Nq, Dv)`` and ``(B, H, Nq)``; a row that sees nothing gives zeros and −inf."""
    from .ops import attention
    from .plan import APART

    arguments, counts = _arguments(call)
    out, lse = attention(*arguments)
    if isinstance(call.layout, Groups) and counts[-1] == APART:
        return average(call, call.layout, out.flatten(0, 2), lse.flatten())
    return out, lse


def attend_with_entropy(call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`attend`, and the entropy of every row's weights in nats, ``(B, H, Nq)``, 0 for a row that sees nothing.

    Computed in the same pass; without gradients.

    Raises:
        UnsupportedError: for ``Groups`` in which a query is in several groups.
    """
    from .ops import attention_entropy
    from .plan import EVERY, ONE

    arguments, counts = _arguments(call)
    if counts and counts[-1] not in (ONE, EVERY):
        raise UnsupportedError(
            "the entropy of a query in several groups is not computed: its weights are never together. Use a KeySelection or a BlockMask."
        )
    with torch.no_grad():
        return attention_entropy(*arguments)


def _arguments(call: AttentionCall) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    from .plan import visible

    seen = visible(call)
    bias = None if call.bias is None else call.bias.float().contiguous()
    return (
        call.q, call.k, call.v, seen.lo, seen.hi, seen.valid, seen.kinds, seen.slot, seen.table, seen.index, seen.members,
        bias, list(seen.tile), list(seen.counts), call.scale, call.softcap or 0.0, call.base.shift,
    ), seen.counts  # fmt: skip
