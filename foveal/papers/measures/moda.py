"""MODA's claim about cost: what aligning the keys takes beside attention as sequences grow.

Run ``foveal reproduce moda`` to measure it and write the result file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bench.timing import interleaved
from ...kernels.dispatch import attention
from ...layers.moda_align import DuplexAlignment
from .results import write_result

LENGTHS, HEADS, DIM = (256, 1024, 4096), 8, 64
STEEPEST = -0.75
"""Growth exponent of aligner over attention that counts as falling about as 1/N."""


def _aligned(align: DuplexAlignment, k: Tensor, v: Tensor, visual: Tensor) -> Tensor:
    return align(k, visual, align.grams(k, v, visual, torch.ones_like(visual)))


def measure_overhead(repeats: int = 5, seed: int = 0, *, out: Path | None = None) -> dict[str, Any]:
    """Claim ``linear-overhead``: seconds of the Gram matrices, alignment and fusion beside causal attention, interleaved."""
    g = torch.Generator().manual_seed(seed)
    align = DuplexAlignment(DIM)
    jobs: dict[str, Callable[[], Any]] = {}
    for n in LENGTHS:
        q, k, v = (torch.randn(1, HEADS, n, DIM, generator=g) for _ in range(3))
        jobs[f"aligner {n}"] = partial(_aligned, align, k, v, torch.rand(1, n, generator=g) < 0.5)
        jobs[f"attention {n}"] = partial(attention, q, k, v, causal=True)
    with torch.inference_mode():
        seconds = {name: statistics.median(values) for name, values in interleaved(jobs, repeats).items()}
    ratio = {n: seconds[f"aligner {n}"] / seconds[f"attention {n}"] for n in LENGTHS}
    span = math.log(LENGTHS[-1] / LENGTHS[0])
    growth = {
        part: math.log(seconds[f"{part} {LENGTHS[-1]}"] / seconds[f"{part} {LENGTHS[0]}"]) / span
        for part in ("aligner", "attention")
    }
    exponent = math.log(ratio[LENGTHS[-1]] / ratio[LENGTHS[0]]) / span
    numbers = {
        "ours": "aligner / attention "
        + ", ".join(f"{ratio[n]:.2f} at {n}" for n in LENGTHS)
        + f": falls as N^{exponent:.2f}",
        "ratio": {str(n): round(r, 4) for n, r in ratio.items()},
        "ratio_exponent": round(exponent, 3),
        "growth_exponents": {part: round(value, 3) for part, value in growth.items()},
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
        "criterion": STEEPEST,
        "shape": {"heads": HEADS, "head_dim": DIM},
        "repeats": repeats,
    }
    falls = all(a > b for a, b in zip(ratio.values(), list(ratio.values())[1:], strict=False))
    verdict = "reproduced" if falls and exponent <= STEEPEST else "direction holds" if falls else "not reproduced"
    return write_result("moda", "linear-overhead", verdict, numbers, seed=seed, out=out)
