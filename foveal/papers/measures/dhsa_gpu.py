"""DHSA's claims about time and memory: one attention layer at prefill beside dense attention, on one GPU, selection included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...bench.memory import PeakMemory
from ...core.base_mask import BaseMask
from ...core.budget import Budget
from ...core.context import SelectContext
from ...core.density import measure
from ...kernels.call import AttentionCall
from ...kernels.dispatch import compute
from ...patterns.dhsa import DHSA
from ...patterns.operator import attend
from . import gpu
from .results import write_result

LENGTHS = (8192, 16384, 32768, 65536, 131072)
CHUNKS = DHSA(Budget(tokens=2048), variant="chunk", q_block=256)
"""The first version's budget and query blocks, with chunks of fixed length in place of a predictor's."""
DELTA = 0.125


def _layer(
    length: int, heads: int, kv_heads: int, head_dim: int, device: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor, Tensor], SelectContext]:  # fmt: skip
    tensors = gpu.drawn(heads, length, head_dim, device, dtype, kv_heads=kv_heads)
    return tensors, SelectContext(BaseMask.build(length, length, causal=True, device=device))


def _difference(pattern: DHSA, tensors: tuple[Tensor, Tensor, Tensor], ctx: SelectContext) -> float:
    """Largest difference from dense attention under the same mask: all heads where each has its own, else one key head's."""
    q, k, v = tensors
    with torch.no_grad():
        near, layout = attend(pattern, q, k, v, ctx)[0], pattern.select(q, k, ctx)[0]
    if pattern.variant == "chunk" and not pattern.per_head:
        group = q.shape[1] // k.shape[1]
        near, q, k, v = near[:, :group], q[:, :group], k[:, :1], v[:, :1]
    return gpu.error(near, q, k, v, layout, ctx.base)


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])


def _storing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention that stores its scores, as eager implementations do."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.softmax(scores.masked_fill(later, -torch.inf), -1) @ v


def measure_time(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    lengths: tuple[int, ...] = LENGTHS,
    pattern: DHSA = CHUNKS,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 256,
    repeats: int = 5,
) -> dict[str, Any]:
    """Claim ``prefill-time-8k``: the ratio at the shortest of ``lengths`` is judged, and where it crosses 1 is reported."""
    rows, difference = {}, 0.0
    for length in lengths:
        tensors, ctx = _layer(length, heads, kv_heads, head_dim, device, dtype)
        q, k, v = tensors
        jobs: dict[str, Callable[[], Any]] = {
            "dense": partial(_dense, q, k, v),
            "dhsa": partial(attend, pattern, q, k, v, ctx),
            "choosing": partial(pattern.select, q, k, ctx),
        }
        rows[length] = gpu.timed(jobs, repeats, device)
        if length == min(lengths):
            difference = _difference(pattern, tensors, ctx)
    ratio = {length: row["ratio"]["dhsa"] for length, row in rows.items()}
    crossed = next((length for length in sorted(ratio) if ratio[length] < 1), None)
    shown = ", ".join(f"{value:.2f} at {length}" for length, value in ratio.items())
    numbers = {
        "ours": f"over dense {shown}; faster from {crossed or 'no measured length'} on",
        "criterion": f"below 1 at {min(lengths)}",
        "crossover": crossed,
        "difference": difference,
        "rows": {str(length): row for length, row in rows.items()},
        "heads": [heads, kv_heads],
        "head_dim": head_dim,
    }
    decided = gpu.verdict(ratio[min(lengths)] < 1, crossed is not None, difference=difference, dtype=dtype)
    return write_result("dhsa", "prefill-time-8k", decided, numbers, seed=0, out=out)


def measure_memory(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    lengths: tuple[int, ...] = LENGTHS,
    stored_up_to: int = 16384,
    pattern: DHSA = CHUNKS,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 256,
) -> dict[str, Any]:
    """Claim ``prefill-memory-8k``: peak memory of the layer over that of SDPA and of attention that stores its scores.

    Args:
        stored_up_to: longest sequence whose scores are stored; the shortest of ``lengths`` is judged.
    """
    rows: dict[int, dict[str, float]] = {}
    difference = 0.0
    for length in lengths:
        tensors, ctx = _layer(length, heads, kv_heads, head_dim, device, dtype)
        q, k, v = tensors
        jobs: dict[str, Callable[[], Any]] = {"dhsa": partial(attend, pattern, q, k, v, ctx), "sdpa": partial(_dense, q, k, v)}  # fmt: skip
        if length <= stored_up_to:
            jobs["storing"] = partial(_storing, q, k, v)
        rows[length] = {name: peak(job, device) for name, job in jobs.items()}
        if length == min(lengths):
            difference = _difference(pattern, tensors, ctx)
    first = rows[min(lengths)]
    ratio = first["dhsa"] / first["storing"]
    numbers = {
        "ours": f"{first['dhsa']:.0f} MiB at {min(lengths)} tokens: {ratio:.2f} of attention that stores its scores, "
        f"{first['dhsa'] / max(first['sdpa'], 1e-9):.2f} of SDPA",
        "criterion": 1.0,
        "over_storing": round(ratio, 4),
        "peak_mib": {str(n): {name: round(x, 2) for name, x in row.items()} for n, row in rows.items()},
        "difference": difference,
        "heads": [heads, kv_heads],
        "head_dim": head_dim,
    }
    decided = gpu.verdict(ratio < 1, False, difference=difference, dtype=dtype)
    return write_result("dhsa", "prefill-memory-8k", decided, numbers, seed=0, out=out)


def peak(job: Callable[[], Any], device: str) -> float:
    """MiB that a second run adds at its peak; the first one loads and compiles."""
    with torch.no_grad():
        job()
        with PeakMemory(device) as memory:
            job()
    return memory.extra_mb


def measure_long(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    length: int = LENGTHS[-1],
    density: float = DELTA,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    checked: int = 4096,
    repeats: int = 5,
) -> dict[str, Any]:
    """Claim ``speed-up-128k``: the training-free variant ``vsb`` at this density, of Llama-3.1-8B's shape, selection included.

    Args:
        checked: tokens of the call whose output is compared with dense attention under the same mask.
    """
    pattern = DHSA(Budget(density=density))
    difference = _difference(pattern, *_layer(checked, heads, kv_heads, head_dim, device, dtype))
    (q, k, v), ctx = _layer(length, heads, kv_heads, head_dim, device, dtype)
    with torch.no_grad():
        layout = pattern.select(q, k, ctx)[0]
    call = AttentionCall(q, k, v, layout, ctx.base, head_dim**-0.5, return_lse=False)
    jobs: dict[str, Callable[[], Any]] = {
        "dense": partial(_dense, q, k, v),
        "dhsa": partial(attend, pattern, q, k, v, ctx),
        "attention alone": partial(compute, call),
    }
    row = gpu.timed(jobs, repeats, device)
    ratio = row["ratio"]["dhsa"]
    numbers = {
        "ours": f"{ratio:.3f} of the dense time ({1 / ratio:.1f}× faster) at {length} tokens; attention alone {row['ratio']['attention alone']:.3f}",
        "criterion": 2 * density,
        **row,
        "density": round(measure(layout, ctx.base, 1, heads, kv_heads).density, 4),
        "difference": difference,
        "heads": [heads, kv_heads],
        "head_dim": head_dim,
    }
    decided = gpu.verdict(ratio <= 2 * density, ratio < 1, difference=difference, dtype=dtype)
    return write_result("dhsa", "speed-up-128k", decided, numbers, seed=0, out=out)
