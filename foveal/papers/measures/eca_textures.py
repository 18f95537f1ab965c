"""ECA on procedural textures whose class is which two filters occur together, so that channels have to interact."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...layers.channel import insert_channel_attention
from ...models.resnet import ResNet
from ...recipes.classify import accuracy
from ...recipes.fit import fit
from .results import sign_test, summary, write_result

FILTERS, SIDE, NOISE = 8, 24, 3.5
PAIRS = torch.combinations(torch.arange(FILTERS))
BLOCKS, WIDTH = (1, 1, 1), 16
STEPS, BATCH, RATE, HELD_OUT, SEEDS = 120, 48, 5e-3, 4096, 3
VARIANTS = {"plain": None, "Var1": "se_var1", "Var2": "se_var2", "Var3": "se_var3", "SE": "se", "ECA": "eca"}
LOSS, FEWER = 0.002, 30


def bank() -> Tensor:
    """``(FILTERS, SIDE, SIDE // 2 + 1)`` band-pass filters in the frequency domain: four orientations at two frequencies."""
    y, x = torch.meshgrid(torch.fft.fftfreq(SIDE), torch.fft.rfftfreq(SIDE), indexing="ij")
    filters = []
    for i in range(FILTERS):
        angle, frequency = math.pi * (i % 4) / 4, (0.15, 0.3)[i // 4]
        along, across = frequency * math.cos(angle), frequency * math.sin(angle)
        near = [((x - s * along) ** 2 + (y - s * across) ** 2) / (2 * 0.05**2) for s in (1, -1)]
        filters.append(torch.exp(-near[0]) + torch.exp(-near[1]))
    return torch.stack(filters)


def textures(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(n, 1, SIDE, SIDE)``, each white noise through two of the filters plus noise, and which pair ``(n,)``."""
    label = torch.randint(len(PAIRS), (count,), generator=generator)
    white = torch.randn(count, 2, SIDE, SIDE, generator=generator)
    waves = torch.fft.irfft2(torch.fft.rfft2(white) * bank()[PAIRS[label]], s=(SIDE, SIDE))
    waves = waves / waves.std((2, 3), keepdim=True)
    return waves.sum(1, keepdim=True) + NOISE * torch.randn(count, 1, SIDE, SIDE, generator=generator), label


def network(variant: str, seed: int) -> tuple[ResNet, int]:
    """A small residual network with the gate in every block, and how many weights the gates have; convolutions alike in all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = ResNet(BLOCKS, classes=len(PAIRS), channels=1, width=WIDTH, small=True)
        kind = VARIANTS[variant]
        added = 0 if kind is None else sum(i.parameters for i in insert_channel_attention(net, kind))
    return net, added


def trained(variant: str, seed: int, steps: int) -> float:
    """Accuracy on fresh textures."""
    net, _ = network(variant, seed)

    def loss(step: int, g: torch.Generator) -> Tensor:
        x, y = textures(BATCH, g)
        return torch.nn.functional.cross_entropy(net(x), y)

    fit(net, loss, steps, lr=RATE, warmup=min(10, steps), seed=seed)
    return accuracy(net, *textures(HELD_OUT, torch.Generator().manual_seed(1_000_003)))


def measure_textures(steps: int = STEPS, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``textures-with-few-weights``."""
    scores = {v: [trained(v, s, steps) for s in range(seed, seed + seeds)] for v in VARIANTS}
    weights = {v: network(v, seed)[1] for v in VARIANTS}
    mean = {v: fmean(s) for v, s in scores.items()}
    difference = [a - b for a, b in zip(scores["ECA"], scores["SE"], strict=True)]
    numbers = {
        "ours": "; ".join(f"{v} {100 * mean[v]:.1f} %" for v in VARIANTS)
        + f"; {weights['ECA']} attention weights against {weights['SE']}",
        "accuracy": {v: summary(s) for v, s in scores.items()},
        "by_seed": {v: [round(a, 4) for a in s] for v, s in scores.items()},
        "eca_minus_se": summary(difference),
        "sign_test": sign_test(difference),
        "attention_weights": weights,
        "order": sorted(VARIANTS, key=lambda v: mean[v]),
        "classes": len(PAIRS),
        "steps": steps,
        "seeds": seeds,
    }
    kept = mean["ECA"] >= mean["SE"] - LOSS and weights["SE"] >= FEWER * weights["ECA"]
    return write_result(
        "eca", "textures-with-few-weights", "direction holds" if kept else "not reproduced", numbers, seed=seed, out=out
    )
