"""SparseD on a masked-diffusion model that was trained to find values: accuracy beside windows, and how its masks behave.

Task: 64 key–value pairs spread over a prompt of 448 tokens; the answer of 64 tokens names 32 keys, whose values are masked.
Sampling: 32 steps over four blocks of 16 tokens; SparseD's blocks are 16 tokens, its mask is made at step 7 of 0…31.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...core.context import SelectContext, State
from ...core.density import Density, measure
from ...core.layouts import Layout
from ...models import Pass
from ...patterns import Pattern
from ...patterns.dense import Dense
from ...patterns.sliding_window import SlidingWindow
from ...patterns.sparsed import SparseD
from . import recall
from .results import sign_test, summary, write_result

SEEDS, ROWS = 3, 8
STEPS, BLOCK, SINKS = 32, 16, 16
LOST, AHEAD = 0.02, 0.10
STABLE, APART = 0.7, 0.15
METHOD = SparseD(keep=0.3, skip=0.2, steps=STEPS, generated=recall.ANSWER, block=BLOCK)
JOINT, EARLY = replace(METHOD, generated=0), replace(METHOD, skip=0.0)
"""All blocks ranked together; and the mask made at step 1, after two dense steps, the fewest that the rule allows."""


@dataclass(frozen=True)
class Blocks(Dense):
    """Dense attention that notes which blocks SparseD would keep; its state maps steps to ``(B, H, q blocks, key blocks)``."""

    steps: tuple[int, ...] = ()

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        noted = {} if state is None else state
        return None, (noted | {ctx.step: METHOD.blocks(q, k, ctx)} if ctx.step in self.steps else noted)


@dataclass(frozen=True)
class Answers:
    """Share of values found, and the density of the last step (all layers)."""

    accuracy: float
    density: float


def answers(seed: int, pattern: Pattern) -> Answers:
    """Sample the answers of held-out sequences under a pattern."""
    model, task = recall.diffusion_model(seed), recall.held_out(ROWS, seed)
    found: list[Density] = []

    def watch(run: Pass) -> None:
        if run.step == STEPS - 1:
            heads = recall.HEADS
            found.extend(measure(s.layout, run.base, ROWS, heads, heads) for s in run.selections.values())

    prompt, answer = task.ids.split([recall.LENGTH - recall.ANSWER, recall.ANSWER], 1)
    asked = torch.where(task.answer[:, -recall.ANSWER :], model.mask, answer)
    out = model.sample(prompt, recall.ANSWER, STEPS, block=BLOCK, given=asked, policy=pattern, watch=watch)
    right = (out == task.ids)[task.answer].double().mean()
    return Answers(float(right), fmean(d.density for d in found))


def window(density: float, sinks: int) -> SlidingWindow:
    """The smallest window, open to both sides, with at least this density over the measured length."""
    n = recall.LENGTH
    for size in range(1, n + 1):
        inside = n * (2 * size - 1) - size * (size - 1)
        if sinks:  # rows whose window does not reach the first tokens see them too
            inside += sum(min(sinks, max(i - size + 1, 0)) for i in range(n))
        if inside >= density * n * n:
            return SlidingWindow(size, sinks)
    return SlidingWindow(n, sinks)


@functools.lru_cache(maxsize=8)
def compared(seed: int) -> dict[str, Answers]:
    """Every method on the same sequences."""
    found = {"dense": answers(seed, Dense()), "sparsed": answers(seed, METHOD)}
    density = found["sparsed"].density
    found["sliding window"] = answers(seed, window(density, 0))
    found["sinks and window"] = answers(seed, window(density, SINKS))
    return found


def measure_accuracy(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``dream-accuracy`` on the small model: dense, SparseD, and windows of the same density in every step."""
    runs = [compared(seed) for seed in range(seeds)]
    accuracy = {name: summary([run[name].accuracy for run in runs]) for name in runs[0]}
    mean = {name: float(value["mean"]) for name, value in accuracy.items()}
    learnt = mean["dense"] >= 0.9
    kept = mean["sparsed"] >= mean["dense"] - LOST
    ahead = max(mean["sliding window"], mean["sinks and window"]) <= mean["sparsed"] - AHEAD
    numbers = {
        "ours": f"{100 * mean['dense']:.1f} % dense, {100 * mean['sparsed']:.1f} % SparseD, {100 * mean['sliding window']:.1f} % sliding "
        f"window, {100 * mean['sinks and window']:.1f} % sinks and window",
        "accuracy": accuracy,
        "density": {name: round(fmean(run[name].density for run in runs), 4) for name in runs[0]},
        "criterion": f"SparseD ≥ dense − {LOST}, windows ≤ SparseD − {AHEAD}, and a model that has learnt the task (dense ≥ 0.9)",
        "answers_per_seed": ROWS * recall.ASKED,
        "seeds": seeds,
    }
    good = learnt and kept and ahead
    verdict = "reproduced" if good else "direction holds" if learnt and ahead else "not reproduced"
    return write_result("sparsed", "dream-accuracy", verdict, numbers, seed=0, out=out)


def jaccard(a: Tensor, b: Tensor) -> float:
    """Mean over leading axes of |a ∩ b| / |a ∪ b| of the last two."""
    both, either = ((a & b).flatten(-2).sum(-1).double(), (a | b).flatten(-2).sum(-1).double())
    return float((both / either.clamp(min=1)).mean())


@functools.lru_cache(maxsize=8)
def overlaps(seed: int) -> dict[str, float]:
    """Overlap of kept blocks between the step of the mask and the last step (same head), and between heads of a layer."""
    model, task = recall.diffusion_model(seed), recall.held_out(ROWS, seed)
    first, last = METHOD.last_dense, STEPS - 1
    noted: list[dict[int, Tensor]] = []

    def watch(run: Pass) -> None:
        if run.step == last:
            noted.extend(run.states.values())

    prompt, answer = task.ids.split([recall.LENGTH - recall.ANSWER, recall.ANSWER], 1)
    asked = torch.where(task.answer[:, -recall.ANSWER :], model.mask, answer)
    model.sample(
        prompt, recall.ANSWER, STEPS, block=BLOCK, given=asked, policy=Blocks(steps=(first, last)), watch=watch
    )
    steps = fmean(jaccard(layer[first], layer[last]) for layer in noted)
    pairs = [(i, j) for i in range(recall.HEADS) for j in range(i)]
    heads = fmean(jaccard(layer[first][:, i], layer[first][:, j]) for layer in noted for i, j in pairs)
    answer_rows = slice((recall.LENGTH - recall.ANSWER) // BLOCK, None)
    late = fmean(jaccard(layer[first][:, :, answer_rows], layer[last][:, :, answer_rows]) for layer in noted)
    return {"steps": steps, "heads": heads, "steps, rows of the answer": late}


def measure_stability(*, seeds: int = SEEDS, out: Path | None = None) -> dict[str, Any]:
    """Claim ``stable-head-patterns``: overlap over steps and between heads; isolated against joint ranking and a late against an
    early mask are reported and not judged."""
    found = [overlaps(seed) for seed in range(seeds)]
    mean = {name: fmean(f[name] for f in found) for name in found[0]}
    accuracy = {
        "isolated, s = 0.2": [compared(seed)["sparsed"].accuracy for seed in range(seeds)],
        "joint ranking": [answers(seed, JOINT).accuracy for seed in range(seeds)],
        "isolated, s = 0": [answers(seed, EARLY).accuracy for seed in range(seeds)],
    }
    ours = accuracy["isolated, s = 0.2"]
    stable, apart = mean["steps"] >= STABLE, mean["steps"] - mean["heads"] >= APART
    numbers = {
        "ours": f"overlap {mean['steps']:.2f} over steps, {mean['heads']:.2f} between heads",
        "jaccard": {name: summary([f[name] for f in found]) for name in found[0]},
        "criterion": f"over steps ≥ {STABLE} and ≥ between heads + {APART}",
        "accuracy": {name: summary(values) for name, values in accuracy.items()},
        "sign_test": {
            f"isolated − {name}": sign_test([a - b for a, b in zip(ours, accuracy[name], strict=True)])
            for name in ("joint ranking", "isolated, s = 0")
        },
        "seeds": seeds,
    }
    verdict = "reproduced" if stable and apart else "direction holds" if apart else "not reproduced"
    return write_result("sparsed", "stable-head-patterns", verdict, numbers, seed=0, out=out)
