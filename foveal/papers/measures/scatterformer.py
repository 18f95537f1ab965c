"""ScatterFormer's claims that two cores can check: no cost of padding, and that both of its parts matter.

Run ``python -m foveal.papers.measures.scatterformer`` to measure both and write their result files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...bench.timing import interleaved, speedups
from ...kernels.linear import linear_attention
from ...kernels.linear_ragged import linear_attention_packed
from ...layers.scatter import EPS, ScatterStage
from ...recipes.fit import fit
from .command import run_measures
from .results import write_result

SETS, HEADS, HEAD_DIM = 500, 4, 32
SPREAD, MEAN = 1.5, 1.8
"""Of the logarithms of window sizes: about 10,000 voxels, the longest window tens of times the mean."""
WASTE, PADDED, NAIVE = 5.0, 0.5, 0.25


def padded(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Every window padded to the longest."""
    parts = []
    for x in (q, k, v):
        part = x.new_zeros(*valid.shape, *x.shape[1:])
        part[valid] = x
        parts.append(part.transpose(1, 2))
    return linear_attention(parts[0], parts[1], parts[2], valid=valid, eps=EPS)[0].transpose(1, 2)[valid]


def naive(q: Tensor, k: Tensor, v: Tensor, window: Tensor, count: int) -> Tensor:
    """One outer product per voxel, scattered into its window."""
    states = q.new_zeros(count, *k.shape[1:], v.shape[-1]).index_add_(0, window, k[..., None] * v[:, :, None])
    sums = q.new_zeros(count, *k.shape[1:]).index_add_(0, window, k)
    return torch.einsum("vhf,vhfd->vhd", q, states[window]) / ((q * sums[window]).sum(-1, keepdim=True) + EPS)


def measure_padding(repeats: int = 5, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``no-padding-cost``: the packed form beside padding to the longest window and beside the per-voxel form."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp(MEAN + SPREAD * torch.randn(SETS, generator=g)).long() + 1
    cu = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    valid, window = torch.arange(int(sizes.max())) < sizes[:, None], torch.repeat_interleave(torch.arange(SETS), sizes)
    q, k, v = (torch.rand(int(cu[-1]), HEADS, HEAD_DIM, generator=g) for _ in range(3))
    jobs: dict[str, Callable[[], Tensor]] = {
        "packed": lambda: linear_attention_packed(q, k, v, cu, eps=EPS)[0],
        "padded": partial(padded, q, k, v, valid),
        "naive": partial(naive, q, k, v, window, SETS),
    }
    with torch.inference_mode():
        outs = {name: job() for name, job in jobs.items()}
        seconds = interleaved(jobs, repeats)
    error = max(float((outs["packed"] - outs[name]).abs().max()) for name in ("padded", "naive"))
    over = {name: speedups(seconds, "packed")[name].median for name in ("padded", "naive")}  # packed time over theirs
    waste = valid.numel() / len(q)
    met = waste >= WASTE and over["padded"] <= PADDED and over["naive"] <= NAIVE and error <= 1e-5
    ahead = max(over.values()) < 1 and error <= 1e-5
    numbers = {
        "packed_time_over": {k: round(x, 3) for k, x in over.items()},
        "padded_rows_over_voxels": round(waste, 2),
        "largest_difference": float(f"{error:.2g}"),
        "criterion": {"padded_at_most": PADDED, "naive_at_most": NAIVE, "waste_at_least": WASTE, "difference": 1e-5},
        "voxels": len(q),
        "windows": SETS,
        "longest_window": int(sizes.max()),
        "repeats": repeats,
    }
    verdict = "reproduced" if met else "direction holds" if ahead else "not reproduced"
    return write_result("scatterformer", "no-padding-cost", verdict, numbers, seed=seed, out=out)


WINDOW, GRID, FILLED, SCENES, DIM, STEPS = 4, (2, 16, 16), 0.4, 2, 32, 80
VARIANTS = {"full": {}, "no attention": {"attention": False}, "no interaction": {"interaction": False}}  # fmt: skip


def scenes(count: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random voxels ``(V, 4)``, features ``(V, 2)`` of ±1, and two labels ``(V, 2)`` in {0, 1}.

    Label (i): the majority of feature 0 in the voxel's window. Label (ii): the majority of feature 1 among voxels of the same height
    that are at most half a window away along x or along y and in another window. Ties are 0.
    """
    coords = (torch.rand(count, *GRID, generator=g) < FILLED).nonzero()
    x = torch.randint(0, 2, (len(coords), 2), generator=g).float() * 2 - 1
    cell = torch.div(coords[:, 2:], WINDOW, rounding_mode="floor")
    same_scene = coords[:, None, 0] == coords[None, :, 0]
    same_window = same_scene & (cell[:, None] == cell[None]).all(-1)
    step = (coords[:, None, 1:] - coords[None, :, 1:]).abs()
    line = (step[..., 0] == 0) & (step[..., 1:].amin(-1) == 0) & (step[..., 1:].amax(-1) <= WINDOW // 2)
    across = same_scene & ~same_window & line
    inside = same_window.float() @ x[:, 0]
    return coords, x, torch.stack([inside > 0, across.float() @ x[:, 1] > 0], 1).float()


class Segmenter(nn.Module):
    """Two blocks between two linear layers; a logit per label."""

    def __init__(self, options: dict[str, bool]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, DIM), nn.Linear(DIM, 2)
        self.stage = ScatterStage(DIM, 2, WINDOW, 2, **options)

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        return self.head(self.stage(self.embed(x), coords))


def accuracy(variant: str, seed: int, steps: int) -> tuple[float, float]:
    """Held-out accuracy for labels (i) and (ii) of a model trained from this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Segmenter(VARIANTS[variant])

    def loss(step: int, g: torch.Generator) -> Tensor:
        coords, x, labels = scenes(SCENES, g)
        return nn.functional.binary_cross_entropy_with_logits(model(x, coords), labels)

    fit(model, loss, steps, lr=5e-3, seed=seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            m.momentum = (
                None  # running statistics of the trained weights, the authors' momentum being slow for so few steps
            )
            m.reset_running_stats()
            m.train()
    g = torch.Generator().manual_seed(10_000 + seed)
    with torch.inference_mode():
        for _ in range(8):
            coords, x, _ = scenes(SCENES, g)
            model(x, coords)
        coords, x, labels = scenes(4 * SCENES, g)
        right = ((model.eval()(x, coords) > 0) == (labels > 0)).double().mean(0)
    return float(right[0]), float(right[1])


def measure_parts(seeds: int = 3, seed: int = 0, steps: int = STEPS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``both-parts-matter``: segmentation by window context (i) and by voxels of neighbouring windows (ii), with parts left out."""
    found = {name: [accuracy(name, s, steps) for s in range(seed, seed + seeds)] for name in VARIANTS}
    mean = {name: [fmean(a[i] for a in values) for i in (0, 1)] for name, values in found.items()}

    def beyond(other: str, label: int) -> bool:
        """Whether the full model's worst seed is above the other's best."""
        return min(a[label] for a in found["full"]) > max(a[label] for a in found[other])

    window, across = beyond("no attention", 0), beyond("no interaction", 1)
    ahead = mean["full"][0] > mean["no attention"][0] and mean["full"][1] > mean["no interaction"][1]
    verdict = "reproduced" if window and across else "direction holds" if ahead else "not reproduced"
    numbers = {
        "mean_accuracy": {k: {"window": round(v[0], 4), "across": round(v[1], 4)} for k, v in mean.items()},
        "accuracy_per_seed": {k: [[round(a, 4) for a in pair] for pair in v] for k, v in found.items()},
        "criterion": "the worst full seed above the best seed without attention (window) and without interaction (across)",
        "steps": steps,
        "seeds": seeds,
        "voxels_per_step": round(SCENES * FILLED * GRID[0] * GRID[1] * GRID[2]),
    }
    return write_result("scatterformer", "both-parts-matter", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure both claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of ScatterFormer.", (measure_padding, measure_parts))


if __name__ == "__main__":
    main()
