"""Circuit reuse on SmolLM2-135M: the circuits of IOI and Colored Objects, their overlap, and the edit of four heads. No claim of the paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ...bench.results import rounded
from ...lens.circuits import Circuit, build_pairs, find_circuit, names, overlaps
from ...lens.effects import Head
from ...lens.patching import compare, patch_paths
from ...lens.row_edit import reaction, sweep
from .command import run_measures
from .results import write_result

PROMPTS, INHIBITION = 64, 3


def circuits(prompts: int, seed: int) -> tuple[Any, dict[str, Circuit]]:
    """The model, and both circuits."""
    from ...hf.load import load_model

    loaded = load_model("smollm2")
    return loaded, {
        task: find_circuit(loaded.model, build_pairs(task, loaded.tokenizer, prompts, seed))
        for task in ("ioi", "colored_objects")
    }


def luck(chance: float, prompts: int) -> float:
    """The accuracy that guessing exceeds in about one of forty samples."""
    return chance + 2 * math.sqrt(chance * (1 - chance) / prompts)


def four_heads(circuit: Circuit) -> dict[str, list[Head]]:
    """By the paper's recipe: the strongest heads that set the movers' queries, and the mover with the most negative effect."""
    movers, queries = circuit.stages[0].effects, circuit.stages[1].heads
    negative = min(movers.top(0.1), key=lambda head: float(movers.effect[head]))
    return {"inhibition": [head for head in queries if head != negative][:INHIBITION], "negative mover": [negative]}


def measure_overlap(*, prompts: int = PROMPTS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``smollm2-shares-heads``."""
    _, found = circuits(prompts, seed)
    curve = overlaps(found["ioi"], found["colored_objects"])
    at = next(row for row in curve if row.share == found["ioi"].share)
    numbers: dict[str, Any] = {
        "ours": f"{len(at.shared)} heads shared of {at.sizes[0]} and {at.sizes[1]}, overlap {at.jaccard:.2f}; random sets {at.chance.mean:.3f}, "
        f"95th percentile {at.chance.q95:.3f}",
        "curve": [row.to_json() for row in curve], "accuracy": {task: c.accuracy for task, c in found.items()}, "prompts": prompts,
        "circuits": {
            task: [{"stage": f.stage.name, "receivers": f.effects.receiver, "heads": {n: float(f.effects.effect[h]) for n, h in zip(names(f.heads), f.heads, strict=True)}} for f in c.stages]
            for task, c in found.items()
        },
        "difference": {task: [float(x.mean()) for x in (c.stages[0].effects.clean_difference, c.stages[0].effects.corrupt_difference)] for task, c in found.items()},
    }  # fmt: skip
    verdict = (
        "reproduced" if at.jaccard >= 0.6 else "direction holds" if at.jaccard > at.chance.q95 else "not reproduced"
    )
    return write_result("circuit_reuse", "smollm2-shares-heads", verdict, rounded(numbers), seed=seed, out=out)


def measure_edit(*, prompts: int = PROMPTS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``smollm2-four-head-edit``: heads from the IOI circuit, edited on Colored Objects."""
    from ...hf.load import load_model

    loaded = load_model("smollm2")
    groups = four_heads(find_circuit(loaded.model, build_pairs("ioi", loaded.tokenizer, prompts, seed)))
    c = compare(loaded.model, build_pairs("colored_objects", loaded.tokenizer, 4 * prompts, seed))
    result = sweep(c, groups, controls=10, seed=seed)
    movers = patch_paths(c)
    moved = reaction(c, [head for heads in groups.values() for head in heads], movers, share=0.05)
    base, all_four = result.rows["none"], result.rows["all"]
    control = result.rows["random heads"]
    partial = [result.rows[name]["accuracy"] for name in groups]
    between = all(
        min(base["accuracy"], all_four["accuracy"]) < p < max(base["accuracy"], all_four["accuracy"]) for p in partial
    )
    near = abs(control["accuracy"] - base["accuracy"]) <= 0.03
    numbers = {
        "ours": f"accuracy {100 * base['accuracy']:.1f} % → {100 * all_four['accuracy']:.1f} % with four heads; random heads {100 * control['accuracy']:.1f} ± {100 * control['spread']:.1f} %",
        **result.to_json(), "movers": {"right": moved.right, "wrong": moved.wrong, "spearman": None if moved.spearman != moved.spearman else moved.spearman},
        "partial_between": between, "control_near_baseline": near,
    }  # fmt: skip
    gain = all_four["accuracy"] - base["accuracy"]
    verdict = "reproduced" if all_four["accuracy"] >= 1.8 * base["accuracy"] and between and near else "direction holds" if gain > 0.03 and gain > control["accuracy"] - base["accuracy"] + 2 * control["spread"] else "not reproduced"  # fmt: skip
    return write_result("circuit_reuse", "smollm2-four-head-edit", verdict, rounded(numbers), seed=seed, out=out)


if __name__ == "__main__":
    run_measures(__doc__, [measure_overlap, measure_edit], brief=True)
