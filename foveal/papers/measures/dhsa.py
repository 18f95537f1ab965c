"""DHSA's premises on synthetic keys: do chunks that follow the content recall more, and does √length scaling help?

Sequence: segments of random length, each with one of ``TOPICS`` Gaussian topics; a key is its segment's topic plus noise.
The rows of a segment ask for ``WANTED`` topics of earlier segments. Measured is the share of the dense attention mass that
falls on the keys kept at a given density, by the same selection code as the pattern's, over the second half of the rows.

Run ``python -m foveal.papers.measures.dhsa`` to measure both claims and write their result files.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...core.base_mask import BaseMask
from ...patterns.dhsa_chunks import Chunks, Pooling, pool_chunks, select_chunks, spans
from .results import write_result

LENGTH, DIM, TOPICS, WANTED = 4096, 64, 64, 4
SEGMENT = (8, 120)
Q_BLOCK = 64
DENSITY = 0.125
NOISE = 1.0
"""Standard deviation of a key around its topic, whose entries have 1: the setting that decides a verdict."""
OTHER_NOISE = (0.0, 0.5, 2.0, 4.0)
GAIN = 0.5
SEEDS = 50
MARGIN = 0.05


@dataclass(frozen=True, eq=False)
class Sample:
    """q and k ``(1, 1, N, D)`` and the first position of every segment."""

    q: Tensor
    k: Tensor
    starts: Tensor


def sample(seed: int, noise: float = NOISE, equal: int | None = None) -> Sample:
    """One sequence; ``equal`` gives all segments this length."""
    g = torch.Generator().manual_seed(seed)
    low, high = SEGMENT
    lengths = (
        torch.randint(low, high + 1, (LENGTH // low,), generator=g)
        if equal is None
        else torch.full((LENGTH // equal,), equal)
    )
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    starts = starts[starts < LENGTH]
    of = torch.searchsorted(starts, torch.arange(LENGTH), right=True) - 1
    centres = torch.randn(TOPICS, DIM, generator=g)
    topic = torch.randint(TOPICS, (len(starts),), generator=g)
    k = centres[topic][of] + noise * torch.randn(LENGTH, DIM, generator=g)
    asked = (torch.rand(len(starts), WANTED, generator=g) * torch.arange(1, len(starts) + 1)[:, None]).long()
    q = GAIN * centres[topic[asked]].sum(1)[of] + GAIN * noise * torch.randn(LENGTH, DIM, generator=g)
    return Sample(q[None, None], k[None, None], starts[None])


def equal_blocks(count: int) -> Tensor:
    """``(1, count)`` first positions of ``count`` blocks of as equal length as possible."""
    return (torch.arange(count) * LENGTH // count)[None]


def mass_recall(data: Sample, first: Tensor, pooling: Pooling = "avgpool_norm", density: float = DENSITY) -> float:
    """Share of the dense mass on the keys kept with these chunks, averaged over the second half of the rows."""
    base = BaseMask.build(LENGTH, LENGTH, causal=True)
    chunks = Chunks(first, pool_chunks(data.k, first, base, pooling), LENGTH, (0,), ())
    span = spans(base, Q_BLOCK, Q_BLOCK, 0, 0, density, share=True)
    index = select_chunks(data.q, chunks, base, Q_BLOCK, pooling, span).index[0, 0]
    total = 0.0
    for u in range(LENGTH // Q_BLOCK // 2, LENGTH // Q_BLOCK):
        rows = torch.arange(u * Q_BLOCK, (u + 1) * Q_BLOCK)
        logits = data.q[0, 0, rows] @ data.k[0, 0].T / DIM**0.5
        weights = torch.softmax(logits.masked_fill(torch.arange(LENGTH) > rows[:, None], -torch.inf), -1)
        total += float(weights[:, index[u][index[u] >= 0]].sum()) / Q_BLOCK
    return total / (LENGTH // Q_BLOCK - LENGTH // Q_BLOCK // 2)


def measure_boundaries(seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``boundaries-beat-fixed-blocks``: chunks at the true boundaries against as many blocks of equal length."""
    by_noise = {}
    for noise in (NOISE, *OTHER_NOISE):
        both = []
        for s in range(seed, seed + seeds):
            data = sample(s, noise)
            both.append((mass_recall(data, data.starts), mass_recall(data, equal_blocks(data.starts.shape[1]))))
        true, fixed = (fmean(x) for x in zip(*both, strict=True))
        wins = sum(a > b for a, b in both)
        by_noise[str(noise)] = {"true_boundaries": round(true, 4), "fixed_blocks": round(fixed, 4), "wins": wins}
    main = by_noise[str(NOISE)]
    gain = main["true_boundaries"] - main["fixed_blocks"]
    verdict = "reproduced" if gain >= MARGIN else "direction holds" if gain > 0 else "not reproduced"
    numbers = {
        "ours": f"mass recall {main['true_boundaries']:.3f} with true boundaries, {main['fixed_blocks']:.3f} with fixed blocks",
        "recall_gain": round(gain, 4),
        "criterion": MARGIN,
        "density": DENSITY,
        "seeds": seeds,
        "by_noise": by_noise,
    }
    return write_result("dhsa", "boundaries-beat-fixed-blocks", verdict, numbers, seed=seed, out=out)


def measure_normalisation(seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``length-normalisation``: √n · mean against the plain mean, with varying lengths and with equal ones."""
    by_noise = {}
    for noise in (NOISE, *OTHER_NOISE):
        both = []
        for s in range(seed, seed + seeds):
            data = sample(s, noise)
            both.append((mass_recall(data, data.starts), mass_recall(data, data.starts, "avgpool")))
        scaled, plain = (fmean(x) for x in zip(*both, strict=True))
        wins, ties = sum(a > b for a, b in both), sum(a == b for a, b in both)
        by_noise[str(noise)] = {"scaled": round(scaled, 4), "plain": round(plain, 4), "wins": wins, "ties": ties}
    equal = [sample(s, equal=SEGMENT[1] // 2 + 4) for s in range(seed, seed + min(seeds, 5))]
    tie = all(mass_recall(d, d.starts) == mass_recall(d, d.starts, "avgpool") for d in equal)
    main = by_noise[str(NOISE)]
    verdict = "not reproduced"
    if tie and main["scaled"] > main["plain"]:
        verdict = "reproduced" if main["wins"] >= 0.9 * seeds else "direction holds"
    numbers = {
        "ours": f"mass recall {main['scaled']:.3f} with √n · mean, {main['plain']:.3f} with the mean; better in {main['wins']} of {seeds} draws",
        "wins": main["wins"],
        "seeds": seeds,
        "equal_lengths_tie": tie,
        "density": DENSITY,
        "by_noise": by_noise,
    }
    return write_result("dhsa", "length-normalisation", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure both claims; ``--out`` is the folder of result files, by default the source checkout's."""
    parser = argparse.ArgumentParser(description="Measure DHSA's premises on synthetic keys.")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    for measure in (measure_boundaries, measure_normalisation):
        result = measure(args.seeds, args.seed, args.out)
        print(f"{result['claim']}: {result['verdict']}  {result['measured']}")


if __name__ == "__main__":
    main()
