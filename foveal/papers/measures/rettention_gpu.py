"""Re-ttention's claim about time: a sparse step of CogVideoX's shape beside a dense one, on one GPU.

226 text tokens and 13 frames of 30×45 tokens, whose equal places lie side by side. A sparse step is the whole operator: the
band's attention, the ratio and the residual.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...core.base_mask import BaseMask
from ...core.context import SelectContext
from ...patterns.frame_band import FrameBand
from ...patterns.operator import attend
from ...patterns.rettention import Rettention
from . import gpu
from .results import write_result

KEEP, WARMUP, STEPS = 1 / 32, 15, 50
LIMIT = 0.25


def measure_latency(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    text: int = 226,
    frames: int = 13,
    places: int = 30 * 45,
    heads: int = 30,
    head_dim: int = 64,
    keep: float = KEEP,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``latency``: sparse over dense time of one step, and what that makes of a run of 50 steps.

    Args:
        places: tokens of a frame. keep: share of a frame's tokens that the band covers.
    """
    length = text + frames * places
    q, k, v = gpu.drawn(heads, length, head_dim, device, dtype)
    band = FrameBand(keep, frames, text, order="places")
    method = Rettention(band, warmup=WARMUP)
    base = BaseMask.build(length, length, causal=False, device=device)
    refresh, sparse = (SelectContext(base, step=step) for step in (WARMUP, WARMUP + 1))
    with torch.no_grad():
        state = attend(method, q, k, v, refresh)[2]
        near = attend(band, q, k, v, refresh)[0]
    jobs: dict[str, Callable[[], Any]] = {
        "dense": partial(sdpa, q, k, v),
        "band": partial(attend, band, q, k, v, sparse),
        "sparse": partial(attend, method, q, k, v, sparse, state),
        "refresh": partial(attend, method, q, k, v, refresh),
    }
    row: dict[str, Any] = gpu.timed(jobs, repeats, device)
    difference = gpu.error(near, q, k, v, band.select(q, k, sparse)[0], base, heads=1)
    x = row["ratio"]["sparse"]
    run = method.run_cost(STEPS, x)
    kinds = method.schedule(STEPS)
    timed_run = sum(1.0 if kind == "full" else row["ratio"][kind] for kind in kinds) / STEPS
    numbers = {
        "ours": f"a sparse step takes {x:.3f} of a dense one (−{100 * (1 - x):.0f} %), a run of {STEPS} steps {run:.3f} of a dense run",
        "criterion": LIMIT,
        "whole_run_ratio": round(run, 4),
        "whole_run_ratio_with_timed_refreshes": round(timed_run, 4),
        "steps": {kind: kinds.count(kind) for kind in ("full", "refresh", "sparse")},
        "difference": difference,
        **row,
        "tokens": length,
        "heads": heads,
        "head_dim": head_dim,
    }
    decided = gpu.verdict(x <= LIMIT, x < 1, difference=difference, dtype=dtype)
    return write_result("rettention", "latency", decided, numbers, seed=0, out=out)
