"""What claims about speed on a GPU share: drawn tensors, several ways to do one job timed in turns, and the error beside the times.

A measure takes its device, dtype, sizes and repeats as arguments; its defaults are the card's, on CUDA in bfloat16.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...bench.results import rounded
from ...bench.timing import interleaved, speedups
from ...core.base_mask import BaseMask
from ...core.context import SelectContext, State
from ...core.layouts import Layout
from ...kernels.call import AttentionCall
from ...kernels.reference import visible_pairs
from ...patterns import Pattern
from ...patterns.operator import attend

DEVICE, DTYPE, REPEATS = "cuda", torch.bfloat16, 10
CLOSE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-4}
"""Largest difference from dense attention under the same mask that counts as the same result."""
Row = dict[str, dict[str, float]]
"""``ms``: median milliseconds of every job. ``ratio``: median over the turns of its time over the baseline's."""


def drawn(
    heads: int, length: int, head_dim: int, device: str, dtype: torch.dtype, *, kv_heads: int | None = None, batch: int = 1, q_len: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Normal q ``(B, H, Nq or N, D)``, k and v ``(B, Hkv or H, N, D)``."""
    make = torch.Generator(device).manual_seed(seed)
    sizes = [(heads, length if q_len is None else q_len), *[(kv_heads or heads, length)] * 2]
    q, k, v = (torch.randn(batch, h, n, head_dim, generator=make, device=device, dtype=dtype) for h, n in sizes)
    return q, k, v


def timed(
    jobs: Mapping[str, Callable[[], Any]], repeats: int, device: str, *, baseline: str = "dense", backward: bool = False, warmup: int = 2
) -> Row:  # fmt: skip
    """Times of all jobs in turns, without gradients unless ``backward``; unmeasured turns before them compile."""
    with torch.set_grad_enabled(backward):
        seconds = interleaved(jobs, repeats, warmup=warmup, device=device)
    faster = speedups(seconds, baseline)
    return {
        "ms": {name: rounded(1e3 * statistics.median(values)) for name, values in seconds.items()},
        "ratio": {name: rounded(1 / spread.median) for name, spread in faster.items()},
    }


def error(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Layout | None, base: BaseMask, heads: int | None = None
) -> float:
    """Largest difference of ``out`` from SDPA under the mask that ``layout`` and ``base`` make, as a dense tensor.

    Args:
        heads: check so many of the query heads; only for layouts that all heads share, and without grouped key heads.
    """
    out, q, k, v = (t[:, :heads] for t in (out, q, k, v))
    group, worst = q.shape[1] // k.shape[1], []
    with torch.no_grad():
        seen = visible_pairs(AttentionCall(q, k, v, layout, base, q.shape[-1] ** -0.5))
        for b in range(q.shape[0]):  # one key head at a time: with a mask, SDPA would copy the keys of all query heads
            for h in range(k.shape[1]):
                own = (slice(b, b + 1), slice(h * group, (h + 1) * group))
                keys, values = (t[b : b + 1, h : h + 1].expand(-1, group, -1, -1) for t in (k, v))
                exact = sdpa(q[own], keys, values, attn_mask=seen[own])
                worst.append((out[own].float() - exact.float()).abs().max())
    return float(rounded(float(torch.stack(worst).max()), 3))


def pattern_error(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, ctx: SelectContext, state: State = None, heads: int | None = None
) -> float:
    """:func:`error` of what a pattern makes of q, k and v, against the mask that it chooses."""
    with torch.no_grad():
        near, layout = attend(pattern, q, k, v, ctx, state)[0], pattern.select(q, k, ctx, state)[0]
    return error(near, q, k, v, layout, ctx.base, heads)


def verdict(reproduced: bool, direction: bool, *, difference: float = 0.0, dtype: torch.dtype = DTYPE) -> str:
    """The verdict on times; a result that differs from dense attention under the same mask is not reproduced whatever its time."""
    if not difference <= CLOSE[dtype]:
        return "not reproduced"
    return "reproduced" if reproduced else "direction holds" if direction else "not reproduced"
