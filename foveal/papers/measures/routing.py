"""Routing attention's claims that two cores can check: the cost law, the captured mass, and the leak of the top-w rule.

Run ``python -m foveal.papers.measures.routing`` to measure all three and write their result files.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...bench.timing import interleaved
from ...kernels.dispatch import attention
from ...layers.kmeans import Centroids, nearest_tokens, normalise, update
from ...layers.routing import RoutingAttention
from .command import run_measures
from .results import write_result

HEAD_DIM = 64
ROUTING_LENGTHS, DENSE_LENGTHS = (8192, 16384, 32768, 65536), (2048, 4096, 8192, 16384)
"""Where the cost law is fitted: routing of shorter sequences costs mostly what a call costs."""
EXPONENTS = (1.3, 1.7)
DENSE_EXPONENT = 1.8


def measure_cost(repeats: int = 5, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``cost-law``: seconds of one routing head with Kc = w = √n against n, beside dense attention; projections excluded."""
    g = torch.Generator().manual_seed(seed)
    jobs: dict[str, Callable[[], Tensor]] = {}
    for n in ROUTING_LENGTHS:
        jobs[f"routing {n}"] = partial(_route, *_case(n, g, seed))
    for n in DENSE_LENGTHS:
        _, q, v, _ = _case(n, g, seed)
        jobs[f"dense {n}"] = partial(attention, q, q, v, causal=True)
    with torch.inference_mode():
        seconds = {name: statistics.median(values) for name, values in interleaved(jobs, repeats).items()}
    growth = {
        kind: slope([math.log(n) for n in lengths], [math.log(seconds[f"{kind} {n}"]) for n in lengths])
        for kind, lengths in (("routing", ROUTING_LENGTHS), ("dense", DENSE_LENGTHS))
    }
    inside = EXPONENTS[0] <= growth["routing"] <= EXPONENTS[1]
    verdict = "reproduced" if inside and growth["dense"] >= DENSE_EXPONENT else "not reproduced"
    if verdict == "not reproduced" and growth["routing"] < growth["dense"]:
        verdict = "direction holds"
    numbers = {
        "ours": f"time grows as n^{growth['routing']:.2f}, dense as n^{growth['dense']:.2f}",
        "growth_exponent": {k: round(v, 3) for k, v in growth.items()},
        "criterion": {"routing": list(EXPONENTS), "dense_at_least": DENSE_EXPONENT},
        "seconds": {k: round(v, 5) for k, v in seconds.items()},
        "head_dim": HEAD_DIM,
        "repeats": repeats,
    }
    return write_result("routing", "cost-law", verdict, numbers, seed=seed, out=out)


def _case(n: int, g: torch.Generator, seed: int) -> tuple[RoutingAttention, Tensor, Tensor, Centroids]:
    width = round(math.sqrt(n))
    layer = RoutingAttention(HEAD_DIM, 1, clusters=width, window=width, mode="paper", rotary=False).eval()
    q, v = (torch.randn(1, 1, n, HEAD_DIM, generator=g) for _ in range(2))
    return layer, normalise(q), v, layer.initial_state(seed)


def _route(layer: RoutingAttention, q: Tensor, v: Tensor, state: Centroids) -> Tensor:
    return layer.route(q, v, state)[0]


def slope(x: list[float], y: list[float]) -> float:
    """Of the least-squares line."""
    mx, my = fmean(x), fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


TOKENS, CLUSTERS = 1024, 16
SEPARABLE, LEAST_GAIN, TOLERANCE = 0.5, 2.0, 0.15
"""Noise of the separable case; what the criteria ask for."""


def clustered(seed: int, noise: float | None) -> Tensor:
    """``(1, 1, N, D)`` normalised tokens around random centres; ``noise`` None gives isotropic tokens."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HEAD_DIM, generator=g)
    if noise is not None:
        centres = torch.randn(CLUSTERS, HEAD_DIM, generator=g)
        x = centres[torch.randint(CLUSTERS, (TOKENS,), generator=g)] + noise * x
    return normalise(x)[None, None]


def captured(x: Tensor, seed: int) -> dict[str, float]:
    """Share of the dense attention mass on the selected pairs, per way of selecting ``TOKENS / CLUSTERS`` keys per row."""
    window = TOKENS // CLUSTERS
    g = torch.Generator().manual_seed(seed)
    first = x[0, 0][torch.randperm(TOKENS, generator=g)[:CLUSTERS]][None]
    state = Centroids(first, first, torch.ones(1, CLUSTERS))
    for _ in range(30):
        state = update(state, x, 0.0)
    weights = torch.softmax(x[0, 0] @ x[0, 0].T / HEAD_DIM**0.5, -1)
    index, _ = nearest_tokens(x, state.centres, window)
    shuffled = torch.randperm(TOKENS, generator=g).view(CLUSTERS, window)
    blocks = torch.arange(TOKENS).view(CLUSTERS, window)
    out = {}
    for name, members in (("routing", index[0, 0]), ("random", shuffled), ("local", blocks)):
        mass, rows = 0.0, 0
        for one in members:
            mass += float(weights[one][:, one].sum())
            rows += len(one)
        out[name] = mass / rows
    return out


def measure_mass(seeds: int = 10, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``captured-mass``: routing against random and local members of equal number, after the centroids have converged."""
    numbers: dict[str, Any] = {"seeds": seeds, "tokens": TOKENS, "clusters": CLUSTERS}
    ratios = {}
    for name, noise in (("separable", SEPARABLE), ("isotropic", None)):
        found = [captured(clustered(s, noise), s) for s in range(seed, seed + seeds)]
        mean = {kind: fmean(f[kind] for f in found) for kind in found[0]}
        ratios[name] = mean["routing"] / mean["random"]
        numbers[name] = {**{k: round(v, 4) for k, v in mean.items()}, "routing_over_random": round(ratios[name], 3)}
    gain, even = ratios["separable"] >= LEAST_GAIN, abs(ratios["isotropic"] - 1) <= TOLERANCE
    verdict = "reproduced" if gain and even else "direction holds" if gain else "not reproduced"
    numbers["ours"] = "mass over random: " + ", ".join(f"{ratio:.2f} × ({kind})" for kind, ratio in ratios.items())
    numbers["criterion"] = {"separable_at_least": LEAST_GAIN, "isotropic_within": TOLERANCE}
    return write_result("routing", "captured-mass", verdict, numbers, seed=seed, out=out)


def measure_leak(seeds: int = 10, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``selection-leak``: replace the last 32 of 256 tokens and count the earlier rows that change."""
    length, replaced = 256, 32
    shares: dict[str, list[float]] = {"paper": [], "strict": []}
    for s in range(seed, seed + seeds):
        g = torch.Generator().manual_seed(s)
        x = torch.randn(1, length, HEAD_DIM, generator=g, dtype=torch.float64)
        other = x.clone()
        other[:, -replaced:] = torch.randn(1, replaced, HEAD_DIM, generator=g, dtype=torch.float64)
        for mode in ("paper", "strict"):
            with torch.random.fork_rng(devices=[]), torch.inference_mode():
                torch.manual_seed(s)
                layer = RoutingAttention(HEAD_DIM, 1, clusters=16, window=16, mode=mode, rotary=False).double().eval()
                state = layer.initial_state(s, torch.float64)
                difference = (layer(x, state).out - layer(other, state).out)[:, :-replaced].abs().amax(-1)
            shares[mode].append(float((difference > 1e-9).double().mean()))
    leaks, strict = fmean(shares["paper"]), max(shares["strict"])
    numbers = {
        "ours": f"earlier rows changed: {leaks:.0%} in paper mode, {strict:.0%} in strict mode",
        "paper_rows_changed": round(leaks, 4),
        "strict_rows_changed": strict,
        "seeds": seeds,
        "tokens": length,
        "replaced": replaced,
    }
    verdict = "reproduced" if leaks > 0 and strict == 0 else "not reproduced"
    return write_result("routing", "selection-leak", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure all claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of routing attention.", (measure_cost, measure_mass, measure_leak))


if __name__ == "__main__":
    main()
