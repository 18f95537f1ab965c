"""DHSA beside block-sparse attention of the same density, on a causal model that was trained to find values.

Task: 64 key–value pairs spread over 448 tokens, then 32 of the keys, each followed by its value, which is to be predicted. The
whole sequence is prefilled under each pattern; no row is dense.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...core.budget import Budget
from ...patterns import Pattern
from ...patterns.dense import Dense
from ...patterns.dhsa import DHSA
from ...patterns.sliding_window import SlidingWindow
from ...patterns.topk import BlockTopK
from . import recall
from .results import summary, write_result

SEEDS, ROWS, BLOCK = 3, 32, 16
DENSITIES = (0.125, 0.25)
EQUAL = 1.05
"""A method may keep at most so many times the pairs of the block-sparse one to be compared with it."""
BLOCKS = {"q_block": BLOCK, "kv_block": BLOCK}


def methods(density: float) -> dict[str, Pattern]:
    """What is compared at one budget; blocks of 16 keys and 16 rows everywhere."""
    budget = Budget(density=density)
    return {
        "dhsa vsb": DHSA(budget, **BLOCKS),  # type: ignore[arg-type]
        "dhsa chunks": DHSA(budget, variant="chunk", chunk=BLOCK, local=BLOCK, sinks=0, instruction=0, **BLOCKS),  # type: ignore[arg-type]
        "block-sparse": BlockTopK(budget, sinks=0, **BLOCKS),  # type: ignore[arg-type]
        "window": SlidingWindow(max(1, int(recall.LENGTH * (1 - (1 - density) ** 0.5)))),
    }


def found(seed: int, pattern: Pattern) -> tuple[float, float]:
    """Share of values predicted right, and the density of all layers."""
    model, task = recall.causal_model(seed), recall.held_out(ROWS, seed)
    ids, asked = task.ids[:, :-1], task.answer[:, 1:]
    run = model.begin(ids, pattern, measuring=True)
    with torch.no_grad():
        guess = model(ids, run=run).argmax(-1)
    right = (guess == task.ids[:, 1:])[asked].double().mean()
    return float(right), fmean(d.density for d in run.densities.values())


def measure_accuracy(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``accuracy-kept``, its part on a small trained model; at most "direction holds" without the part on a GPU."""
    dense = summary([found(seed, Dense())[0] for seed in range(seeds)])
    rows: dict[str, Any] = {}
    better, learnt = True, dense["mean"] >= 0.9
    for density in DENSITIES:
        runs = {name: [found(seed, method) for seed in range(seeds)] for name, method in methods(density).items()}
        rows[str(density)] = {
            name: summary([r[0] for r in some]) | {"density": round(fmean(r[1] for r in some), 4)}
            for name, some in runs.items()
        }
        ours, theirs = rows[str(density)]["dhsa vsb"], rows[str(density)]["block-sparse"]
        better &= ours["mean"] >= theirs["mean"] and ours["density"] <= EQUAL * theirs["density"]
    first = rows[str(DENSITIES[0])]
    numbers = {
        "ours": f"at density {DENSITIES[0]}: {100 * first['dhsa vsb']['mean']:.1f} % DHSA, {100 * first['block-sparse']['mean']:.1f} % "
        f"block-sparse, {100 * dense['mean']:.1f} % dense",
        "dense": dense,
        "budgets": rows,
        "criterion": f"DHSA (vsb) ≥ block-sparse at both budgets with at most {EQUAL} × its pairs, and dense ≥ 0.9",
        "answers_per_seed": ROWS * recall.ASKED,
        "seeds": seeds,
    }
    verdict = "direction holds" if better and learnt else "not reproduced"
    return write_result("dhsa", "accuracy-kept", verdict, numbers, seed=0, out=out)
