"""CARE-Edit's sparse dispatch: how many token·expert pairs it computes, and that nothing but work changes.

The two attending experts (text and base) run where they have weight and one token around, which the adapter's convolution reads.
With the gate γ the base expert runs everywhere; it is also the shared one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers.care import CareLayer, Conditions, Edited
from .results import summary, write_result

SIDE, DIM, BATCH, TEXT, SEEDS = 32, 64, 4, 12, 3
KINDS = ("smooth", "scattered")
EQUAL = 1e-5


def tokens(kind: Literal["smooth", "scattered"] | str, g: torch.Generator) -> Tensor:
    """``(BATCH, SIDE², DIM)`` of deviation 1: fields of large patches, as images have, or every token by itself."""
    if kind == "smooth":
        field = F.interpolate(torch.randn(BATCH, DIM, 4, 4, generator=g), size=(SIDE, SIDE), mode="bilinear")
        field = field / field.std()
        return field.flatten(2).mT
    return torch.randn(BATCH, SIDE * SIDE, DIM, generator=g)


def both(kind: str, top_k: int, seed: int) -> tuple[Edited, Edited]:
    """The same layer, dense and sparse, with adapters that do something."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = CareLayer(DIM, top_k=top_k, output="mixture").eval()
        for name, p in dense.named_parameters():
            if name.endswith("up.weight") or "router.experts" in name:
                torch.nn.init.normal_(p, std=0.3)
    sparse = copy.deepcopy(dense)
    sparse.dispatch = "sparse"
    h = tokens(kind, g)
    given = Conditions(
        text=torch.randn(BATCH, TEXT, DIM, generator=g),
        base=torch.randn(BATCH, SIDE * SIDE, DIM, generator=g),
        ref=torch.randn(BATCH, SIDE * SIDE, DIM, generator=g),
        latent=torch.randn(BATCH, DIM, SIDE, SIDE, generator=g),
        mask=torch.rand(BATCH, 1, SIDE, SIDE, generator=g),
    )
    task, time = torch.arange(BATCH) % 4, torch.rand(BATCH, generator=g)
    with torch.inference_mode():
        return tuple(layer(h, (SIDE, SIDE), task, time, given) for layer in (dense, sparse))  # type: ignore[return-value]


def measure_dispatch(seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``sparse-dispatch-work``: pairs that the text expert computes over all tokens, for K = 1 to 4."""
    everything = BATCH * SIDE * SIDE
    shares: dict[str, list[float]] = {}
    chosen: dict[str, float] = {}
    worst = 0.0
    for kind in KINDS:
        for top_k in (1, 2, 3, 4):
            name = f"{kind}, K = {top_k}"
            for s in range(seed, seed + seeds):
                dense, sparse = both(kind, top_k, s)
                worst = max(worst, float((dense.out - sparse.out).abs().max()))
                shares.setdefault(name, []).append((sparse.work - everything) / everything)  # the base expert's part
                chosen[name] = chosen.get(name, 0.0) + float(sparse.routing.chosen[..., 0].double().mean()) / seeds
    mean = {name: sum(v) / len(v) for name, v in shares.items()}
    bound = {name: int(name[-1]) / 4 for name in mean}
    numbers = {
        "ours": "text expert's share of tokens at K = 1, 2, 3: "
        + "; ".join(kind + " " + ", ".join(f"{mean[f'{kind}, K = {k}']:.2f}" for k in (1, 2, 3)) for kind in KINDS)
        + f"; largest difference {worst:.1e}",
        "executed_share": {name: summary(v) for name, v in shares.items()},
        "chosen_share": {name: round(v, 4) for name, v in chosen.items()},
        "bound": bound,
        "largest_difference": worst,
        "tokens": SIDE * SIDE,
        "seeds": seeds,
    }
    equal = worst <= EQUAL
    within = equal and all(mean[name] <= bound[name] for name in mean)
    less = equal and all(mean[f"smooth, K = {k}"] <= (1 + k / 4) / 2 for k in (1, 2, 3))  # nearer to K/4 than to dense
    verdict = "reproduced" if within else "direction holds" if less else "not reproduced"
    return write_result("care_edit", "sparse-dispatch-work", verdict, numbers, seed=seed, out=out)
