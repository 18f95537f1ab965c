"""How this machine's matrix products in a dtype compare with its float32 ones: some processors only emulate half precision."""

from __future__ import annotations

import functools
import time

import torch

EDGE = 256
"""Edge of the trial matrices: long enough to tell emulation from hardware, milliseconds even when emulated."""


@functools.cache
def slowdown(dtype: torch.dtype) -> float:
    """Time of ``x @ wᵀ``, the product of a linear layer, in ``dtype`` over its time in float32, on the CPU; the best of ten each."""
    return _seconds(dtype) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    a = torch.ones(EDGE, EDGE, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, a.T)
        best = min(best, time.perf_counter() - start)
    return best
