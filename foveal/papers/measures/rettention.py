"""Re-ttention's claim on tensors that drift slowly, and on pictures: which correction stays closest to dense attention?

Queries and keys are noise plus smooth features of their position, so that attention is local; queries, keys and values turn
by ``DRIFT`` radians per step between two independent draws. Every mode gets the same refresh schedule.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...core.base_mask import BaseMask
from ...core.context import SelectContext
from ...patterns.dense import Dense
from ...patterns.frame_band import FrameBand
from ...patterns.operator import attend
from ...patterns.rettention import Rettention
from . import rettention_digits
from .results import write_result

LENGTH, HEADS, DIM, STEPS, PERIOD, KEEP = 1024, 4, 32, 20, 5, 1 / 32
DRIFT = 0.02
LOCALITY = 1.7
"""Size of the positional part of q and k, whose features have 1: the band then holds about nine tenths of the mass."""
OTHER = ((0.005, LOCALITY), (0.1, LOCALITY), (DRIFT, 1.2), (DRIFT, 2.4))
"""Further settings of drift and locality, reported and not judged."""
NOISE = 0.5
SEEDS = 3
BETTER, FAR_BETTER = 0.9, 0.2


def features() -> Tensor:
    """``(N, D)`` sines and cosines of the position, wavelengths from 16 tokens to the whole sequence."""
    wavelength = torch.logspace(math.log10(16), math.log10(LENGTH), DIM // 2)
    angle = 2 * math.pi * torch.arange(LENGTH)[:, None] / wavelength
    return torch.cat([angle.sin(), angle.cos()], 1)


def drifting(seed: int, drift: float, locality: float) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v ``(1, H, N, D)`` of every step."""
    make = torch.Generator().manual_seed(seed)
    draws = [torch.randn(3, 1, HEADS, LENGTH, DIM, generator=make) for _ in range(2)]
    place = locality * features()
    out = []
    for step in range(STEPS):
        q, k, v = math.cos(drift * step) * draws[0] + math.sin(drift * step) * draws[1]
        out.append((place + NOISE * q, place + NOISE * k, v))
    return out


def errors(seed: int, drift: float, locality: float, methods: dict[str, Rettention]) -> tuple[dict[str, float], float]:
    """Mean relative output error of the sparse steps of every method, and the mean ratio ρ of the refreshes."""
    base = BaseMask.build(LENGTH, LENGTH, causal=False)
    states: dict[str, Any] = dict.fromkeys(methods)
    found: dict[str, list[float]] = {name: [] for name in methods}
    ratios = []
    with torch.no_grad():
        for step, (q, k, v) in enumerate(drifting(seed, drift, locality)):
            ctx = SelectContext(base, step=step)
            exact = attend(Dense(), q, k, v, ctx)[0]
            for name, method in methods.items():
                out, _, states[name] = attend(method, q, k, v, ctx, states[name])
                if method.kind(step) == "sparse":
                    found[name].append(float((out - exact).norm() / exact.norm()))
                elif name == "plain":
                    ratios.append(float(states[name].ratio.mean()))
    return {name: fmean(values) for name, values in found.items()}, fmean(ratios)


def measure_reshape(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``reshape-beats-residual`` on drifting tensors and on digits; reproduced when both criteria are met; the direction holds
    when reshape beats residual and both beat plain, in both."""
    plain = Rettention(FrameBand(KEEP), warmup=0, period=PERIOD, mode="plain", ramp=0.0)
    methods = {
        "plain": plain,
        "ratio": replace(plain, mode="ratio"),
        "residual": replace(plain, mode="residual"),
        "reshape": replace(plain, mode="reshape"),
        "reshape λ=0.01": replace(plain, mode="reshape", ramp=0.01),
        "reshape λ=0.04": replace(plain, mode="reshape", ramp=0.04),
        "reshape λ=auto": replace(plain, mode="reshape", ramp="auto"),
    }
    rows: list[dict[str, float]] = []
    for drift, locality in ((DRIFT, LOCALITY), *OTHER):
        runs = [errors(seed, drift, locality, methods) for seed in range(seeds)]
        rows.append({"drift": drift, "locality": locality, "mean ratio": round(fmean(run[1] for run in runs), 4)})
        rows[-1] |= {name: round(fmean(run[0][name] for run in runs), 5) for name in methods}
    main = rows[0]
    met = main["reshape"] <= BETTER * main["residual"] and main["residual"] <= FAR_BETTER * main["plain"]
    right = main["reshape"] < main["residual"] < main["plain"]
    pictures = rettention_digits.table(min(seeds, rettention_digits.SEEDS))
    met_there, right_there = rettention_digits.criterion(pictures)
    dB = {name: value["mean"] for name, value in pictures["1/32"].items()}
    numbers = {
        "ours": f"relative error {main['plain']:.3f} plain, {main['residual']:.4f} residual, {main['reshape']:.4f} reshape (λ = 0); "
        f"PSNR of digits {dB['plain']:.1f} / {dB['residual']:.1f} / {dB['reshape λ=0.0']:.1f} dB at keep 1/32",
        "criterion_met": {"drifting tensors": met, "digits": met_there},
        "criterion": f"reshape ≤ {BETTER} × residual, residual ≤ {FAR_BETTER} × plain; digits: reshape ≥ plain + "
        f"{rettention_digits.ABOVE_PLAIN} dB and ≥ residual − {rettention_digits.BELOW_RESIDUAL} dB",
        "digits_psnr": pictures,
        "settings": rows,
        "seeds": seeds,
    }
    both = right and right_there
    verdict = "reproduced" if both and met and met_there else "direction holds" if both else "not reproduced"
    return write_result("rettention", "reshape-beats-residual", verdict, numbers, seed=0, out=out)
