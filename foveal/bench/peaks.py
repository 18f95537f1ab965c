"""What this machine can do at most: matrix products and memory copies, so that a figure stands beside its limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from ..core.speed import slowdown
from .timing import interleaved

EMULATED, SMALL = 4.0, 256
"""Times slower than float32 from which bfloat16 counts as emulated, and the edge of its matrices then."""


def machine_peaks(device: torch.device | str = "cpu", *, size: int | None = None, repeats: int = 7) -> dict[str, Any]:
    """Best rates of torch's own operations.

    Args:
        device: where to measure.
        size: edge of the square matrices; default 2048 on CPU, 8192 on CUDA. Copies move ``32 · size²`` bytes. bfloat16 takes
            256 at most on a CPU that only emulates it, where a large product takes minutes.
        repeats: measurements of each; the best one counts, because a limit is asked for.

    Returns:
        ``fp32_matmul_gflops``, ``bf16_matmul_gflops``: dense products. ``fp32_batched_gflops``: batched products of
        ``(4, 128, 64) × (4, 64, 1024)``, the shape in which attention meets them. ``copy_gb_s``: bytes read plus bytes
        written. The medians stand beside the best ones under ``median``.
    """
    edge = size or (2048 if torch.device(device).type == "cpu" else 8192)
    make = torch.Generator(device).manual_seed(0)
    a = torch.randn(edge, edge, generator=make, device=device)
    half_edge = edge
    if torch.device(device).type == "cpu" and slowdown(torch.bfloat16) > EMULATED:
        half_edge = min(edge, SMALL)
    half = a[:half_edge, :half_edge].bfloat16()
    out, half_out = torch.empty_like(a), torch.empty_like(half)
    queries = torch.randn(4, 128, 64, generator=make, device=device)
    keys = torch.randn(4, 1024, 64, generator=make, device=device)
    scores = torch.empty(4, 128, 1024, device=device)
    source = torch.zeros(4 * edge * edge, device=device)
    target = torch.empty_like(source)
    calls = 32  # small products are repeated: one alone is shorter than the clock is exact

    def batched() -> None:
        for _ in range(calls):
            torch.bmm(queries, keys.transpose(1, 2), out=scores)

    jobs: dict[str, tuple[float, Callable[[], Any]]] = {
        "fp32_matmul_gflops": (2.0 * edge**3, lambda: torch.mm(a, a, out=out)),
        "bf16_matmul_gflops": (2.0 * half_edge**3, lambda: torch.mm(half, half, out=half_out)),
        "fp32_batched_gflops": (2.0 * calls * 4 * 128 * 64 * 1024, batched),
        "copy_gb_s": (2.0 * source.numel() * source.element_size(), lambda: target.copy_(source)),
    }
    seconds = interleaved({name: job for name, (_, job) in jobs.items()}, repeats, warmup=2, device=device)
    best = {name: work / min(seconds[name]) / 1e9 for name, (work, _) in jobs.items()}
    middle = {name: work / statistics.median(seconds[name]) / 1e9 for name, (work, _) in jobs.items()}
    return {**best, "median": middle, "size": edge, "bf16_size": half_edge}
