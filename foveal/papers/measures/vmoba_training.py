"""VMoBA against full attention and MoBA as what a small video denoiser is trained with, at the same number of steps.

Clips: coloured shapes that move, 8 frames of 16×16 pixels as 8×8×8 tokens, 3 layers. VMoBA cuts frames, columns and boxes of 64 tokens in
turn; MoBA cuts the sequence into runs of 64. Both keep about a quarter of the pairs. Every method trains a model of its own from
the same start on the same clips and noise; measured is its loss on fresh clips under the attention it was trained with.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...data.synthetic import shapes
from ...models import DiT
from ...patterns import Pattern
from ...patterns.dense import Dense
from ...patterns.moba import MoBA
from ...patterns.vmoba import VMoBA
from ...recipes.fit import fit
from .results import summary, write_result

FRAMES, SIDE, PATCH = 8, 16, 2
DIM, DEPTH, HEADS = 64, 3, 4
STEPS, BATCH, LR, FRESH = 150, 8, 2e-3, 64
SEEDS = 2
WORSE = 1.05
METHODS: dict[str, Pattern] = {
    "full": Dense(),
    "moba": MoBA(block=64, top_k=2),
    "vmoba": VMoBA(blocks=((1, 0, 0), (0, 2, 4), (4, 4, 4)), threshold=0.3),
}


def trained(seed: int, method: Pattern) -> tuple[float, float]:
    """Loss on fresh clips of a model trained under ``method``, and the share of pairs kept there."""
    grid = (FRAMES, SIDE // PATCH, SIDE // PATCH)
    model = DiT(grid, channels=3, patch=PATCH, dim=DIM, depth=DEPTH, num_heads=HEADS, seed=seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        return model.loss(shapes(BATCH, SIDE, generator, FRAMES)[0], None, generator, policy=method)

    fit(model, loss, STEPS, lr=LR, seed=seed)
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    noisy, t, _, noise = model.noised(shapes(FRESH, SIDE, generator, FRAMES)[0], None, generator)
    run = model.begin(method, measuring=True)
    with torch.no_grad():
        error = float((model(noisy, t, run=run) - noise).square().mean())
    return error, fmean(d.density for d in run.densities.values())


def measure_training(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``training-time-55k``, its part on quality; hours and VBench need GPUs and the model, so at most "direction holds"."""
    runs = {name: [trained(seed, method) for seed in range(seeds)] for name, method in METHODS.items()}
    losses = {name: summary([loss for loss, _ in some]) for name, some in runs.items()}
    mean = {name: value["mean"] for name, value in losses.items()}
    near, ahead = mean["vmoba"] <= WORSE * mean["full"], mean["vmoba"] <= mean["moba"]
    numbers = {
        "ours": f"loss {mean['full']:.4f} full, {mean['moba']:.4f} MoBA, {mean['vmoba']:.4f} VMoBA",
        "loss": losses,
        "density": {name: round(fmean(density for _, density in some), 4) for name, some in runs.items()},
        "runs": {name: [round(loss, 5) for loss, _ in some] for name, some in runs.items()},
        "criterion": f"VMoBA ≤ {WORSE} × full and ≤ MoBA",
        "criterion_met": {"near full": near, "not above MoBA": ahead},
        "tokens": FRAMES * (SIDE // PATCH) ** 2,
        "steps": STEPS,
        "seeds": seeds,
    }
    verdict = "direction holds" if near and ahead else "not reproduced"
    return write_result("vmoba", "training-time-55k", verdict, numbers, seed=0, out=out)
