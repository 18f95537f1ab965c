"""CLEAR's claim about time: discs beside dense attention, from 1024² to 4096² pixels, on one GPU.

Image tokens lie in tiles of 8×16, as a model that permutes once at its entry would have them; the mask is made once per size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...core.base_mask import BaseMask
from ...core.context import SelectContext
from ...patterns.disc import Disc, disc_pairs
from ...patterns.operator import attend
from . import gpu
from .clear import TEXT
from .results import write_result

JUDGED = 16
LIMITS = (0.6, 0.3)
GROWTH, DENSE_GROWTH = 5.0, 12.0


def measure_speed(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    sides: tuple[int, ...] = (64, 128, 256),
    radii: tuple[int, ...] = (8, JUDGED, 32),
    judged: int = JUDGED,
    text: int = TEXT,
    heads: int = 24,
    head_dim: int = 128,
    tile: tuple[int, int] = (8, 16),
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``speed-8k``: attention alone; the last two of ``sides`` (in tokens) are judged, at the radius ``judged``."""
    rows: dict[int, dict[str, Any]] = {}
    difference = 0.0
    for side in sides:
        length = text + side * side
        q, k, v = gpu.drawn(heads, length, head_dim, device, dtype)
        ctx = SelectContext(BaseMask.build(length, length, causal=False, device=device))
        discs = {radius: Disc(radius, (side, side), text, tile) for radius in radii}
        jobs: dict[str, Callable[[], Any]] = {"dense": partial(sdpa, q, k, v)}
        jobs |= {f"r = {radius}": partial(attend, disc, q, k, v, ctx) for radius, disc in discs.items()}
        rows[side] = gpu.timed(jobs, repeats, device)
        rows[side]["pairs"] = {f"r = {r}": round(disc_pairs((side, side), text, r) / length**2, 4) for r in radii}
        if side == min(sides):
            difference = gpu.pattern_error(discs[judged], q, k, v, ctx, heads=1)
    name = f"r = {judged}"
    (small, large), ratio = sides[-2:], {side: rows[side]["ratio"][name] for side in sides}
    growth = {job: rows[large]["ms"][job] / rows[small]["ms"][job] for job in ("dense", name)}
    fast = ratio[small] <= LIMITS[0] and ratio[large] <= LIMITS[1]
    linear = growth[name] <= GROWTH and growth["dense"] >= DENSE_GROWTH
    direction = ratio[large] < 1 and growth[name] < growth["dense"]
    shown = ", ".join(f"{value:.2f} at {side}²" for side, value in ratio.items())
    numbers = {
        "ours": f"{name} over dense {shown}; from {small}² to {large}² {growth[name]:.1f}× against {growth['dense']:.1f}×",
        "criterion": {"ratio": LIMITS, "growth": GROWTH, "growth_dense": DENSE_GROWTH},
        "larger_radius_takes_longer": all(
            rows[large]["ms"][f"r = {a}"] <= rows[large]["ms"][f"r = {b}"] for a, b in pairwise(sorted(radii))
        ),
        "difference": difference,
        "rows": {f"{side}²": row for side, row in rows.items()},
        "heads": heads,
        "head_dim": head_dim,
    }
    decided = gpu.verdict(fast and linear, direction, difference=difference, dtype=dtype)
    return write_result("clear", "speed-8k", decided, numbers, seed=0, out=out)
