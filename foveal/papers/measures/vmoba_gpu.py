"""VMoBA's claim about time: forward and backward of its three partitions in turn beside dense attention, on one GPU.

Grids and partitions are the paper's where it prints them; 13k tokens are the first 8 frames of the grid of 33k.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ...core.base_mask import BaseMask
from ...core.context import SelectContext
from ...core.density import measure
from ...core.layouts import Layout
from ...kernels.call import AttentionCall
from ...kernels.dispatch import compute
from ...patterns.vmoba import VMoBA
from . import gpu
from .results import write_result

Shape = tuple[int, ...]
SETTINGS: dict[str, tuple[Shape, tuple[Shape, ...]]] = {
    "13k": ((8, 30, 52), ((3, 0, 0), (0, 5, 13), (4, 5, 13))),
    "33k": ((21, 30, 52), ((3, 0, 0), (0, 5, 13), (7, 5, 13))),
    "55k": ((24, 36, 64), ((3, 0, 0), (0, 6, 8), (8, 12, 8))),
    "76k": ((21, 45, 80), ((3, 0, 0), (0, 9, 10), (7, 15, 20))),
}
"""Token grid, and the block shapes of three layers; the first setting's error is checked."""
FASTER, OVERHEAD = 1.2, 0.2


def measure_crossover(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    settings: dict[str, tuple[Shape, tuple[Shape, ...]]] = SETTINGS,
    heads: int = 12,
    head_dim: int = 128,
    threshold: float = 0.25,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``speed-crossover``: times of all partitions together over as many dense calls, selection included.

    Args:
        settings: name → token grid and block shapes, from short to long; the last one is judged.
    """
    rows = {
        name: _one(
            VMoBA(blocks, grid, threshold), math.prod(grid), heads, head_dim, device, dtype, repeats, check=i == 0
        )
        for i, (name, (grid, blocks)) in enumerate(settings.items())
    }
    names = list(rows)
    difference, last = rows[names[0]]["difference"], rows[names[-1]]
    crossed = next((name for name in names if rows[name]["times_faster"] >= 1), None)
    shown = ", ".join(f"{row['times_faster']:.2f}× at {name}" for name, row in rows.items())
    numbers = {
        "ours": f"{shown}; choosing takes {100 * last['share_of_choosing']:.0f} % of the time at {names[-1]}",
        "criterion": {"times_faster": FASTER, "share_of_choosing": OVERHEAD, "crossover": f"below {names[-1]}"},
        "crossover": crossed,
        "slower_when_shortest": rows[names[0]]["times_faster"] < 1,
        "difference": difference,
        "rows": rows,
        "heads": heads,
        "head_dim": head_dim,
        "threshold": threshold,
    }
    good = crossed in names[:-1] and last["times_faster"] >= FASTER and last["share_of_choosing"] <= OVERHEAD
    decided = gpu.verdict(good, last["times_faster"] > 1, difference=difference, dtype=dtype)
    return write_result("vmoba", "speed-crossover", decided, numbers, seed=0, out=out)


def _one(
    pattern: VMoBA, length: int, heads: int, head_dim: int, device: str, dtype: torch.dtype, repeats: int, *, check: bool
) -> dict[str, Any]:  # fmt: skip
    q, k, v = (x.requires_grad_() for x in gpu.drawn(heads, length, head_dim, device, dtype))
    base = BaseMask.build(length, length, causal=False, device=device)
    layers = [SelectContext(base, layer_index=i) for i in range(len(pattern.blocks))]
    jobs: dict[str, Callable[[], Any]] = {"dense": partial(_both_ways, lambda: sdpa(q, k, v), q, k, v)}
    for ctx in layers:
        shape = _shown(pattern.blocks[ctx.layer_index])
        jobs[shape] = partial(_both_ways, partial(_near, pattern, q, k, v, ctx), q, k, v)
        jobs[f"choosing {shape}"] = partial(_choose, pattern, q, k, ctx)
    row: dict[str, Any] = gpu.timed(jobs, repeats, device, backward=True)
    whole, choosing = (sum(row["ms"][f"{lead}{_shown(s)}"] for s in pattern.blocks) for lead in ("", "choosing "))
    row |= {
        "times_faster": round(len(layers) * row["ms"]["dense"] / whole, 4),
        "share_of_choosing": round(choosing / whole, 4),
        "kept": {
            _shown(pattern.blocks[c.layer_index]): round(measure(_choose(pattern, q, k, c), base, 1, heads).density, 4)
            for c in layers
        },
        "tokens": length,
    }
    if check:
        q, k, v = (x.detach()[:, :1] for x in (q, k, v))
        row["difference"] = max(
            gpu.error(_near(pattern, q, k, v, ctx), q, k, v, _choose(pattern, q, k, ctx), base) for ctx in layers
        )
    return row


def _both_ways(run: Callable[[], Tensor], *leaves: Tensor) -> Any:
    return torch.autograd.grad(run().sum(), leaves)


@torch.no_grad()
def _choose(pattern: VMoBA, q: Tensor, k: Tensor, ctx: SelectContext) -> Layout | None:
    return pattern.select(q, k, ctx)[0]


def _near(pattern: VMoBA, q: Tensor, k: Tensor, v: Tensor, ctx: SelectContext) -> Tensor:
    layout = _choose(pattern, q, k, ctx)
    return compute(AttentionCall(q, k, v, layout, ctx.base, q.shape[-1] ** -0.5, return_lse=False))[0]


def _shown(shape: Shape) -> str:
    return "×".join(map(str, shape))
