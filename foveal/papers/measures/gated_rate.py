"""Gated attention at learning rates beyond the best one, and the time that the gate adds to an attention block."""

from __future__ import annotations

import functools
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from ...bench.timing import interleaved
from ...layers.gated import GateConfig, GatedAttention
from ...models import DecoderLM, Hosted
from .characters import characters, taught
from .results import summary, write_result

DIM, DEPTH, HEADS, RATIO, LENGTH, BATCH, STEPS, SEEDS = 64, 4, 4, 2.0, 64, 8, 150, 3
RATES = (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
"""Each the double of the one before. The tuned rate is the baseline's best; the ones at 2 and 4 times it are compared."""
WIDTH, TOKENS, MOST, HERE_MOST = 2048, 4096, 0.02, 0.05


def model_of(gated: bool, seed: int) -> DecoderLM:
    """The decoder; with the gate, a feed-forward layer that is narrower by as many parameters."""
    gate = GateConfig() if gated else None

    def attention(index: int) -> Hosted:
        return Hosted(GatedAttention(DIM, HEADS, gate=gate), index)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        ratio = RATIO - 1 / 3 if gated else RATIO
        return DecoderLM(characters()[2], DIM, DEPTH, attention=attention, ratio=ratio, seed=seed)


def held_out_loss(gated: bool, rate: float, seed: int, steps: int) -> float:
    """Loss on held-out text after training at one rate."""
    return taught(model_of(gated, seed), LENGTH, batch=BATCH, steps=steps, rate=rate, seed=seed)["loss"]


def measure_rate(steps: int = STEPS, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``larger-learning-rate``: how much more the baseline loses than G1 at two and four times the baseline's best rate."""
    loss = {
        name: {rate: [held_out_loss(gated, rate, s, steps) for s in range(seed, seed + seeds)] for rate in RATES}
        for name, gated in (("baseline", False), ("G1", True))
    }
    mean = {name: {rate: fmean(v) for rate, v in rows.items()} for name, rows in loss.items()}
    tuned = min(RATES[:-2], key=lambda rate: mean["baseline"][rate])
    increase = {
        name: [round(rows[factor * tuned] - rows[tuned], 5) for factor in (2, 4)] for name, rows in mean.items()
    }
    worse = [b > g for b, g in zip(increase["baseline"], increase["G1"], strict=True)]
    numbers = {
        "ours": f"loss at 2 and 4 times {tuned:g}: baseline {increase['baseline'][0]:+.3f} and {increase['baseline'][1]:+.3f}, "
        f"G1 {increase['G1'][0]:+.3f} and {increase['G1'][1]:+.3f} nats",
        "tuned_rate": tuned,
        "increase": increase,
        "increase_ratio": [
            round(b / g, 3) if g > 0 else None for b, g in zip(increase["baseline"], increase["G1"], strict=True)
        ],
        "loss": {name: {f"{rate:g}": summary(v) for rate, v in rows.items()} for name, rows in loss.items()},
        "parameters": {
            name: sum(p.numel() for p in model_of(gated, 0).parameters())
            for name, gated in (("baseline", False), ("G1", True))
        },
        "depth": DEPTH,
        "steps": steps,
        "seeds": seeds,
    }
    degrades = increase["baseline"][1] > 0
    verdict = "direction holds" if degrades and all(worse) else "not reproduced"
    return write_result("gated", "larger-learning-rate", verdict, numbers, seed=seed, out=out)


def measure_overhead(repeats: int = 9, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``gate-overhead``: one attention block forward, with the gate over without, turn by turn, in float32."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, WIDTH, generator=g)
    blocks = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, gate in (
            ("baseline", None), ("elementwise", GateConfig()), ("headwise", GateConfig(granularity="headwise")),
        ):  # fmt: skip
            blocks[name] = GatedAttention(WIDTH, max(1, WIDTH // 128), gate=gate).eval()

    def run(block: GatedAttention) -> Tensor:
        with torch.inference_mode():
            return block(x)

    turns = interleaved({k: functools.partial(run, b) for k, b in blocks.items()}, repeats, warmup=1)
    over = {
        k: median(a / b for a, b in zip(turns[k], turns["baseline"], strict=True)) - 1
        for k in ("elementwise", "headwise")
    }
    numbers = {
        "ours": f"elementwise {100 * over['elementwise']:+.1f} %, headwise {100 * over['headwise']:+.1f} % of an attention block's time",
        "overhead": {k: round(v, 4) for k, v in over.items()},
        "seconds": {k: round(median(v), 5) for k, v in turns.items()},
        "criterion": HERE_MOST,
        "width": WIDTH,
        "tokens": TOKENS,
        "dtype": "float32",
        "repeats": repeats,
    }
    cheap = over["headwise"] <= HERE_MOST
    verdict = (
        "reproduced" if cheap and over["elementwise"] <= HERE_MOST else "direction holds" if cheap else "not reproduced"
    )
    return write_result("gated", "gate-overhead", verdict, numbers, seed=seed, out=out)
