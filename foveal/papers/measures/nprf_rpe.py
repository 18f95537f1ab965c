"""NPRF's claims that two cores can check: error against norm, growth with the length, and the cost of converting a trained model.

Run ``python -m foveal.papers.measures.nprf_rpe`` to measure all three and write their result files.
"""

from __future__ import annotations

import math
import statistics
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from ...bench.timing import Clock, interleaved
from ...data.text import load_text
from ...kernels.dispatch import attention
from ...kernels.toeplitz_attention import toeplitz_attention
from ...layers.nprf import NPRFAttention
from ...layers.nprf_convert import conversion_drop, weight_error
from ...layers.random_features import draw_directions, positive_features
from ...models.blocks import Pass
from ...models.decoder_lm import DecoderLM
from ...recipes.fit import fit
from .command import run_measures
from .results import write_result
from .routing import slope

DIM, KEYS = 64, 1024
NORMS, FEATURES = (1.0, 2.0, 4.0, 8.0), (4, 16, 64, 256, 1024)
GROWS, FALLS = 5.0, 0.25
"""err(R=4)/err(R=1) at m=64 at least; err(m=1024)/err(m=16) at R=1 at most."""


def error(norm: float, count: int, seed: int, queries: int = 64) -> float:
    """Mean ‖A − Â‖₁ over rows for queries and keys of norm ``norm``, directions as in the paper's analysis (independent)."""
    g = torch.Generator().manual_seed(seed)
    q, k = (
        norm * nn.functional.normalize(torch.randn(1, 1, n, DIM, generator=g, dtype=torch.float64), dim=-1)
        for n in (queries, KEYS)
    )
    w = draw_directions(1, count, DIM, "gaussian", generator=g).double()
    return weight_error(q, k, positive_features(q, w), positive_features(k, w))


def measure_error(seeds: int = 5, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``error-grows-with-norm``."""
    means = {r: {m: fmean(error(r, m, s) for s in range(seed, seed + seeds)) for m in FEATURES} for r in NORMS}
    grows, falls = means[4.0][64] / means[1.0][64], means[1.0][1024] / means[1.0][16]
    verdict = (
        "reproduced"
        if grows >= GROWS and falls <= FALLS
        else "direction holds"
        if grows > 1 > falls
        else "not reproduced"
    )
    numbers = {
        "error_norm_4_over_norm_1_at_64_features": round(grows, 2),
        "error_1024_over_16_features_at_norm_1": round(falls, 3),
        "criterion": {"at_least": GROWS, "at_most": FALLS, "square_root_law": 0.125},
        "mean_l1_error_by_norm_and_features": {
            f"{r:g}": {str(m): round(e, 3) for m, e in row.items()} for r, row in means.items()
        },
        "keys": KEYS,
        "head_dim": DIM,
        "seeds": seeds,
    }
    return write_result("nprf_rpe", "error-grows-with-norm", verdict, numbers, seed=seed, out=out)


FAST_LENGTHS, DENSE_LENGTHS, MAPPED = (1024, 2048, 4096, 8192, 16384), (1024, 2048, 4096, 8192), (4, 16)
EXPONENT, CROSSOVER = 1.3, 8192


def measure_time(
    repeats: int = 3, seed: int = 0, clock: Clock = time.perf_counter, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``near-linear-time``: one bidirectional head, mapped features given, beside dense softmax with the same bias.

    The dense side is what a user would write: logits, bias and softmax by matrix products; this library's own kernel with a
    relative bias is timed too.
    """
    g = torch.Generator().manual_seed(seed)
    jobs: dict[str, Any] = {}
    for n in FAST_LENGTHS:
        v, c = torch.randn(1, 1, n, DIM, generator=g), torch.rand(1, 2 * n - 1, generator=g)
        for m in MAPPED:
            q, k = (torch.rand(1, 1, n, m, generator=g) for _ in range(2))
            jobs[f"fft {m} {n}"] = partial(toeplitz_attention, q, k, v, c, precision="float32")
        if n in DENSE_LENGTHS:
            q, k = (torch.randn(1, 1, n, DIM, generator=g) for _ in range(2))
            jobs[f"dense {n}"] = partial(dense, q, k, v, c)
            jobs[f"kernel {n}"] = partial(attention, q, k, v, scale=1.0, bias=c)
    with torch.inference_mode():
        seconds = {name: statistics.median(values) for name, values in interleaved(jobs, repeats, clock=clock).items()}

    def grows(kind: str, lengths: tuple[int, ...]) -> float:
        return slope([math.log(n) for n in lengths], [math.log(seconds[f"{kind} {n}"]) for n in lengths])

    growth = {f"fft, {m} features": round(grows(f"fft {m}", FAST_LENGTHS), 3) for m in MAPPED}
    growth["dense"] = round(grows("dense", DENSE_LENGTHS), 3)
    cross = {
        f"{m} features over {kind}": next(
            (n for n in DENSE_LENGTHS if seconds[f"fft {m} {n}"] < seconds[f"{kind} {n}"]), None
        )
        for m in MAPPED
        for kind in ("dense", "kernel")
    }
    first = cross["16 features over dense"]
    exponent = growth["fft, 16 features"]
    crossed, near = first is not None and first <= CROSSOVER, exponent <= EXPONENT
    verdict = (
        "reproduced" if crossed and near else "direction holds" if exponent < growth["dense"] else "not reproduced"
    )
    numbers = {
        "growth_exponent": growth,
        "first_length_faster_than": cross,
        "criterion": {"exponent_at_most": EXPONENT, "crossover_at_most": CROSSOVER},
        "seconds": {name: round(value, 5) for name, value in seconds.items()},
        "repeats": repeats,
        "clock": clock.__name__,
    }
    return write_result("nprf_rpe", "near-linear-time", verdict, numbers, seed=seed, out=out)


def dense(q: Tensor, k: Tensor, v: Tensor, c: Tensor) -> Tensor:
    """softmax(q·kᵀ + b) v with the whole matrix; ``c`` is e^b."""
    logits = q @ k.mT
    logits += c.log().unfold(-1, k.shape[-2], 1).flip(-2)
    return torch.softmax(logits, -1) @ v


LENGTH, BATCH, STEPS, WIDTH, LAYERS, HEADS = 64, 16, 300, 64, 2, 4
COUNTS, DRAWS, BOUND = (16, 32, 64, 256), 3, 0.25
KINDS = {
    "normalised + RPE": (True, 32), "normalised": (True, 0), "un-normalised + RPE": (False, 32), "un-normalised": (False, 0),
}  # fmt: skip


class _InBlock(nn.Module):
    """A layer where the backbone expects one that is told about the pass."""

    def __init__(self, layer: NPRFAttention) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        return self.layer(x)


def trained(kind: str, ids: Tensor, size: int, steps: int, seed: int) -> DecoderLM:
    """A small character model with exact softmax of this kind."""
    normalised, distance = KINDS[kind]
    model = DecoderLM(
        size, WIDTH, LAYERS, HEADS, seed=seed,
        attention=lambda _: _InBlock(
            NPRFAttention(WIDTH, HEADS, causal=True, kernel="softmax", normalised=normalised, max_distance=distance)
        ),
    )  # fmt: skip

    def loss(step: int, g: torch.Generator) -> Tensor:
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=g)
        return model.loss(ids[starts[:, None] + torch.arange(LENGTH)])

    fit(model, loss, steps, lr=3e-3, seed=seed)
    return model


def measure_conversion(seeds: int = 2, seed: int = 0, steps: int = STEPS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``conversion-drop``: train with exact softmax, then swap in random features without any training after it.

    Causal character models on the Python reference text; the drop is in nats per character on held-out text.
    """
    text = load_text()
    symbols = sorted(set(text))
    ids = torch.tensor([symbols.index(ch) for ch in text[:200_000]])
    train, rest = ids[:180_000], ids[180_000:]
    held = rest[: 64 * LENGTH].view(64, LENGTH)
    rows: dict[str, Any] = {}
    for kind in KINDS:
        losses: list[float] = []
        drops: dict[int, list[float]] = {m: [] for m in COUNTS}
        for s in range(seed, seed + seeds):
            model = trained(kind, train, len(symbols), steps, s)
            for m in COUNTS:
                found = conversion_drop(model, lambda one: float(one.loss(held)), m, seeds=range(DRAWS))  # type: ignore[operator]
                drops[m].append(found.drop)
            losses.append(found.before)
        rows[kind] = {
            "loss_with_softmax": [round(x, 4) for x in losses],
            "drop_in_nats": {str(m): round(fmean(values), 4) for m, values in drops.items()},
            "drop_in_nats_per_seed": {str(m): [round(x, 4) for x in values] for m, values in drops.items()},
        }
    ratios = {
        other: round(rows["normalised + RPE"]["drop_in_nats"]["32"] / rows[other]["drop_in_nats"]["32"], 3)
        for other in ("un-normalised", "un-normalised + RPE")
    }
    numbers = {
        "drop_over_that_of": ratios,
        "criterion": {"at_most": BOUND, "features": 32, "against": "un-normalised"},
        "models": rows,
        "steps": steps,
        "seeds": seeds,
        "draws": DRAWS,
    }
    ratio = ratios["un-normalised"]
    verdict = "reproduced" if ratio <= BOUND else "direction holds" if ratio < 1 else "not reproduced"
    return write_result("nprf_rpe", "conversion-drop", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure all claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of NPRF.", (measure_error, measure_time, measure_conversion))


if __name__ == "__main__":
    main()
