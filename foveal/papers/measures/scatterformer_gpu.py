"""ScatterFormer's claim about time, on one GPU: scattered linear attention alone, and chunks beside one outer product per voxel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bench.memory import PeakMemory
from ...kernels.linear_ragged import linear_attention_packed
from ...layers.scatter import EPS, ScatteredLinearAttention, Windows
from . import gpu
from .results import write_result
from .scatterformer import MEAN, SPREAD, naive

LIMIT_MS, FASTER, LESS_MEMORY = 1.0, 5.0, 10.0


def window_ids(voxels: int, seed: int = 0) -> Tensor:
    """``(voxels,)`` rising window numbers; sizes are spread as on real sweeps, log-normally."""
    make = torch.Generator().manual_seed(seed)
    sizes = torch.exp(MEAN + SPREAD * torch.randn(voxels, generator=make)).long() + 1
    return torch.repeat_interleave(torch.arange(voxels), sizes)[:voxels]


def measure_time(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    voxels: int = 60_000,
    sizes: tuple[int, ...] = (1024, 4096, 16384, 65536, 131072),
    dim: int = 128,
    heads: int = 4,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``sla-under-a-millisecond``: the layer's forward at ``voxels``; chunks against the per-voxel form at ``sizes``, forward and
    backward, of which the last is judged."""
    layer = ScatteredLinearAttention(dim, heads).to(device, dtype).eval()
    windows = Windows.from_ids(window_ids(voxels).to(device))
    x = torch.randn(voxels, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    alone = gpu.timed({"layer": partial(layer, x, windows)}, repeats, device, baseline="layer")["ms"]["layer"]
    rows = {str(size): _beside_naive(size, dim, heads, device, dtype, repeats) for size in sizes}
    difference = _difference(min(sizes), dim, heads, device)
    last = rows[str(sizes[-1])]
    numbers = {
        "ours": f"{alone:.3f} ms for {voxels} voxels; at {sizes[-1]} {last['times_faster']:.1f}× faster than per voxel, "
        f"with {last['less_memory']:.1f}× less memory",
        "criterion": {"ms": LIMIT_MS, "times_faster": FASTER, "less_memory": LESS_MEMORY},
        "layer_ms": alone,
        "difference": difference,
        "rows": rows,
        "dim": dim,
        "heads": heads,
    }
    good = alone < LIMIT_MS and last["times_faster"] >= FASTER and last["less_memory"] >= LESS_MEMORY
    ahead = last["times_faster"] > 1 and last["less_memory"] > 1
    decided = gpu.verdict(good, ahead, difference=difference, dtype=torch.float32)
    return write_result("scatterformer", "sla-under-a-millisecond", decided, numbers, seed=0, out=out)


def _problem(
    voxels: int, dim: int, heads: int, device: str, dtype: torch.dtype, leaves: bool
) -> tuple[list[Tensor], dict[str, Callable[[], Tensor]]]:
    """Mapped q, k and v, and both forms."""
    ids = window_ids(voxels).to(device)
    cu, count = Windows.from_ids(ids).cu_seqlens, int(ids[-1]) + 1
    make = torch.Generator().manual_seed(1)
    q, k, v = (torch.rand(voxels, heads, dim // heads, generator=make).to(device, dtype) for _ in range(3))
    tensors = [t.requires_grad_(leaves) for t in (q, k, v)]
    return tensors, {
        "naive": partial(naive, q, k, v, ids, count),
        "packed": lambda: linear_attention_packed(q, k, v, cu, eps=EPS)[0],
    }


def _beside_naive(voxels: int, dim: int, heads: int, device: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    tensors, forms = _problem(voxels, dim, heads, device, dtype, True)
    jobs = {name: partial(_both_ways, run, tensors) for name, run in forms.items()}
    row: dict[str, Any] = gpu.timed(jobs, repeats, device, baseline="naive", backward=True)
    memory = {name: peak(job, device) for name, job in jobs.items()}
    row["times_faster"] = round(1 / row["ratio"]["packed"], 4)
    row["peak_mib"] = {name: round(mib, 3) for name, mib in memory.items()}
    row["less_memory"] = round(memory["naive"] / max(memory["packed"], 1e-9), 4)
    return row


def peak(job: Callable[[], Any], device: str) -> float:
    """MiB that the job adds at its peak."""
    with PeakMemory(device) as memory:
        job()
    return memory.extra_mb


def _both_ways(run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(run().sum(), leaves)


def _difference(voxels: int, dim: int, heads: int, device: str) -> float:
    """Largest difference of the two forms in float32."""
    _, forms = _problem(voxels, dim, heads, device, torch.float32, False)
    return float(f"{float((forms['packed']() - forms['naive']()).abs().max()):.3g}")
