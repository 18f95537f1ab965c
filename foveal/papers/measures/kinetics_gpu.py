"""Kinetics' claim about throughput: a decode step's attention with block top-k beside dense, on one GPU.

The step appends its key to the sums of its page, scores the mean keys of all pages, and attends to the best pages and its own.
Predicted is the ratio of elements read: all keys and values, against the kept ones and one mean key for each page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...core.base_mask import BaseMask
from ...core.budget import Budget
from ...core.context import SelectContext
from ...core.density import measure
from ...kernels.pooling import BlockSums
from ...patterns.operator import attend
from ...patterns.topk import BlockTopK
from . import gpu
from .results import write_result

SHARE, SEQUENCES = 0.5, 16


def elements(length: int, page: int, pages: int) -> tuple[int, int]:
    """Elements of head dimension that one key head reads in a step: dense, and with the best ``pages`` pages beside the open one."""
    open_page = (length - 1) % page + 1
    kept = min(length, page * pages + open_page)
    return 2 * length, 2 * kept + (length - open_page) // page


def _state(pattern: BlockTopK, q: Tensor, k: Tensor, ctx: SelectContext) -> BlockSums:
    """What the pattern remembers of the keys before the step; made for some sequences at a time, because it takes a float32 copy."""
    with torch.no_grad():
        parts = [pattern.select(*some, ctx)[1] for some in zip(q.split(SEQUENCES), k.split(SEQUENCES), strict=True)]
    return replace(parts[0], sums=torch.cat([part.sums for part in parts]))


def measure_throughput(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    batches: tuple[int, ...] = (64, 128, 256),
    length: int = 32768,
    heads: int = 32,
    kv_heads: int = 8,
    head_dim: int = 128,
    page: int = 16,
    pages: int = 64,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``block-topk-throughput``: steps per second over dense, beside the ratio of elements read.

    Args:
        length: keys that the new token sees, its own included.
    """
    dense, sparse = elements(length, page, pages)
    predicted = dense / sparse
    open_page = (length - 1) % page + 1
    pattern = BlockTopK(Budget(tokens=page * pages + open_page), kv_block=page, sinks=0, per_head=False)
    rows, difference, touched = {}, 0.0, 0
    for batch in batches:
        q, k, v = gpu.drawn(heads, length, head_dim, device, dtype, kv_heads=kv_heads, batch=batch, q_len=1)
        before, now = (
            SelectContext(BaseMask.build(1, n, causal=True, device=device), q_offset=n - 1)
            for n in (length - 1, length)
        )
        state = _state(pattern, q, k[:, :, :-1], before)
        jobs: dict[str, Callable[[], Any]] = {
            "dense": partial(sdpa, q, k, v, enable_gqa=heads > kv_heads),
            "block top-k": partial(attend, pattern, q, k, v, now, state),
            "choosing": partial(pattern.select, q, k, now, state),
        }
        row: dict[str, Any] = gpu.timed(jobs, repeats, device)
        row["gain"] = round(1 / row["ratio"]["block top-k"], 4)
        rows[str(batch)] = row
        if batch == min(batches):
            with torch.no_grad():
                near, layout = attend(pattern, q, k, v, now, state)[0], pattern.select(q, k, now, state)[0]
            difference = gpu.error(near, q, k, v, layout, now.base)
            kept = measure(layout, now.base, batch, heads, kv_heads).pairs // (batch * heads)
            touched = 2 * kept + (length - open_page) // page
        del q, k, v, state, jobs
    worst = min(row["gain"] for row in rows.values())
    shown = ", ".join(f"{row['gain']:.2f}× at a batch of {batch}" for batch, row in rows.items())
    numbers = {
        "ours": f"{shown}; {predicted:.2f}× fewer elements read",
        "criterion": round(SHARE * predicted, 4),
        "predicted": round(predicted, 4),
        "elements": {"dense": dense, "formula": sparse, "touched": touched},
        "difference": difference,
        "rows": rows,
        "keys": length,
        "page": page,
        "pages": pages,
    }
    exact = touched == sparse
    decided = gpu.verdict(worst >= SHARE * predicted and exact, worst > 1, difference=difference, dtype=dtype)
    return write_result("kinetics", "block-topk-throughput", decided, numbers, seed=0, out=out)
