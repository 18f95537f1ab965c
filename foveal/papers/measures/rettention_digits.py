"""Re-ttention in the generation that it is made for: digits painted by a small diffusion transformer, sparse against dense.

Every method paints the same digits from the same noise under the same schedule (20 DDIM steps, 5 warm-up, a refresh every 5) and is
compared with the dense picture. ``"band only"`` is the mask in all steps, without any dense one.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...models import Pass
from ...patterns import Operator, Pattern
from ...patterns.frame_band import FrameBand
from ...patterns.rettention import Rettention
from ...patterns.step_state import StepState
from . import painter
from .results import summary, write_result

SEEDS, PICTURES, STEPS, GUIDANCE = 2, 10, 20, 2.0
KEEPS = (1 / 32, 1 / 8)
ABOVE_PLAIN, BELOW_RESIDUAL = 6.0, 0.3
"""dB that reshape must gain over plain, and may lose to residual."""
RAMPS: tuple[float | str, ...] = (0.0, 0.01, 0.04, "auto")


def methods(keep: float) -> dict[str, Pattern | Operator]:
    """All modes, and reshape with every ramp."""
    band = FrameBand(keep, text=painter.TEXT)
    plain = Rettention(band, warmup=5, period=5, mode="plain", ramp=0.0)
    found: dict[str, Pattern | Operator] = {"band only": band, "plain": plain}
    found |= {mode: replace(plain, mode=mode) for mode in ("ratio", "residual")}  # type: ignore[arg-type]
    return found | {f"reshape λ={ramp}": replace(plain, mode="reshape", ramp=ramp) for ramp in RAMPS}  # type: ignore[arg-type]


@functools.lru_cache(maxsize=8)
def painted(seed: int, keep: float) -> dict[str, float]:
    """Mean PSNR in dB to the dense picture by method; mean ratio and its mean absolute drift per step at the refreshes."""
    model = painter.digit_model(seed)
    make = torch.Generator().manual_seed(1_000_003 + seed)
    noise = torch.randn(PICTURES, *model.shape, generator=make)
    text = (torch.arange(PICTURES) % 10)[:, None]
    dense = model.sample(noise, STEPS, text, guidance=GUIDANCE, clip=1.0)
    ratios: list[float] = []
    drifts: list[float] = []

    def watch(run: Pass) -> None:
        for state in run.states.values():
            if (
                isinstance(state, StepState)
                and state.refreshed == run.step
                and state.ratio is not None
                and state.drift is not None
            ):
                ratios.append(float(state.ratio.mean()))
                if state.step > 5:
                    drifts.append(float(state.drift.abs().mean()))

    out = {}
    for name, method in methods(keep).items():
        seen = watch if name == "plain" else None
        sample = model.sample(noise, STEPS, text, guidance=GUIDANCE, clip=1.0, policy=method, watch=seen)
        out[name] = float(painter.psnr(sample, dense).mean())
    return out | {"mean ratio": fmean(ratios), "mean drift": fmean(drifts)}


def table(seeds: int) -> dict[str, dict[str, dict[str, float]]]:
    """By share kept and method: mean and spread over training seeds."""
    rows = {}
    for keep in KEEPS:
        runs = [painted(seed, keep) for seed in range(seeds)]
        rows[f"1/{round(1 / keep)}"] = {name: summary([run[name] for run in runs]) for name in runs[0]}
    return rows


def criterion(rows: dict[str, dict[str, dict[str, float]]]) -> tuple[bool, bool]:
    """Whether reshape (λ = 0) gains what the criterion asks for at every density; and whether it beats residual and both beat plain."""
    dB = [{name: value["mean"] for name, value in row.items()} for row in rows.values()]
    met = all(
        r["reshape λ=0.0"] >= r["plain"] + ABOVE_PLAIN and r["reshape λ=0.0"] >= r["residual"] - BELOW_RESIDUAL
        for r in dB
    )
    return met, all(r["reshape λ=0.0"] > r["residual"] > r["plain"] for r in dB)


def measure_ramp(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``ramp``: every λ, on pictures; HPSv2 is out of reach, so the state is at most "direction holds"."""
    rows = table(seeds)
    first = {name: value["mean"] for name, value in rows["1/32"].items()}
    ramps = {str(ramp): first[f"reshape λ={ramp}"] for ramp in RAMPS}
    best = max(("0.0", "0.01", "0.04"), key=lambda ramp: ramps[ramp])
    numbers = {
        "ours": "PSNR " + ", ".join(f"{value:.1f} (λ = {ramp})" for ramp, value in ramps.items()) + " dB at keep 1/32",
        "best": best,
        "psnr": rows,
        "denoising_error": [round(painter.denoising_error(painter.digit_model(seed)), 4) for seed in range(seeds)],
        "pictures": PICTURES,
        "seeds": seeds,
    }
    return write_result(
        "rettention", "ramp", "direction holds" if best == "0.04" else "not reproduced", numbers, seed=0, out=out
    )
