"""Long-context evidence of SmolLM2-135M: its own attention beside a sparse policy, on the same contexts.

Usage: python benchmarks/eval_smollm2.py [--context 4096] [--policy policy.json] [--text FILE] [--trials 1] [--work FOLDER] [--out FILE]

Runs every task of ``foveal eval``. Without ``--policy`` the sparse one is the block top-k of ``foveal tune``, a quarter of the keys,
in every layer for prefill and decoding. An interrupted run goes on from the journal in ``--work`` (default: foveal's cache), which also holds the report.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from foveal.bench.results import load_average, write_result
from foveal.core.budget import Budget
from foveal.core.cache import cache_dir
from foveal.evals import EvalOptions, run_eval
from foveal.evals.table import table
from foveal.patterns import BlockTopK
from foveal.policies import Policy


def policy_file(folder: Path) -> Path:
    """The default policy, written where the run works."""
    path = folder / "policy.json"
    folder.mkdir(parents=True, exist_ok=True)
    Policy.uniform(BlockTopK(budget=Budget(density=0.25)), name="block top-k 25 %").save(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--text")
    parser.add_argument("--trials", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--work", type=Path, default=cache_dir() / "eval-smollm2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "eval_smollm2.json")
    args = parser.parse_args()
    load = load_average()
    policy = args.policy or policy_file(args.work)
    names = tuple(name for name in args.tasks.split(",") if name)
    options = EvalOptions(
        model=args.model, policies=(str(policy),), context=args.context, tasks=names, text=args.text, trials=args.trials,
        dtype=args.dtype, out=str(args.work),
    )  # fmt: skip
    results: dict[str, Any] = run_eval(options, lambda what, done, total: print(f"[{done}/{total}] {what}", flush=True))
    from rich.console import Console

    Console(width=140).print(table(results))
    kept = {k: v for k, v in results.items() if k != "provenance"}
    result = {
        "what": "long-context tasks, the model's own attention beside a sparse policy",
        **kept,
        "load_before": load,
    }
    print(f"wrote {write_result(args.out, result)}")


if __name__ == "__main__":
    main()
