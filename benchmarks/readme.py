"""Fill the README's measured blocks from the committed result files: ``python benchmarks/readme.py [--check]``.

Nothing here measures. ``--check`` writes nothing and exits with 1 when the README or its picture is stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from foveal.papers.tables import replace_block

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "img" / "tune_pareto.png"


def tune_block(results: dict[str, Any]) -> str:
    """The table of one ``foveal tune`` run, with its provenance."""
    base, machine = results["baseline"], results["machine"]
    lines = [
        f"![Speed against loss]({PICTURE.relative_to(ROOT).as_posix()})",
        "",
        f"**{results['why']}**",
        "",
        "| candidate | density | prefill × | decode × | peak memory × | ppl | ppl, cached decode | KL | needles | |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        f"| {base['name']} (baseline) | – | 1.00 | 1.00 | 1.00 | {base['ppl']:.2f} | {base['decode_ppl']:.2f} | 0 | {_hits(base)} | |",
    ]
    for row in sorted(results["candidates"], key=lambda c: -c["prefill_speedup"]):
        peak = "–" if row["peak_ratio"] is None else f"{row['peak_ratio']:.2f}"
        mark = "**" if row["name"] == results["chosen"] else ""
        lines.append(
            f"| {mark}{row['name']}{mark} | {row['density']:.2f} | {row['prefill_speedup']:.2f} | {row['decode_speedup']:.2f} | {peak} "
            f"| {row['ppl_increase']:+.2%} | {row['decode_ppl_increase']:+.2%} | {row['kl']:.4f} | {_hits(row)} | {row['verdict']} |"
        )
    where = results["provenance"]
    lines += [
        "",
        f"SmolLM2-135M-Instruct at {results['context']:,} tokens, {results['dtype']}, {results['text']['name']}; baseline prefill {base['prefill_s']:.1f} s, "
        f"decode {base['decode_tok_s']:.1f} tokens/s; × is the speed-up over transformers' own `{base['name']}`. {_machine(machine)}, "
        f"torch {where['torch']}, transformers {where['transformers']}, {where['date'][:10]}. "
        "Source: [`benchmarks/results/tune_smollm2_4096.json`](benchmarks/results/tune_smollm2_4096.json).",
    ]
    return "\n".join(lines)


def _hits(row: dict[str, Any]) -> str:
    hits = row["needle_hits"]
    return f"{sum(bool(hit) for _, hit in hits)}/{len(hits)}"


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores"


def picture(results: dict[str, Any], path: Path) -> None:
    """The Pareto plot of the same run."""
    from foveal.tune.report import pareto_png

    path.parent.mkdir(parents=True, exist_ok=True)
    pareto_png(results, path)


def speed_block() -> str:
    """What the kernels were promised to do and what they did, missed targets included."""
    speed, memory, profile = (load(name) for name in ("gather_speed", "gather_memory", "profile_cost"))
    goal = speed["targets"]
    rows = [
        ("10 % of random blocks, 8,192 tokens, forward: times faster than dense SDPA", goal["forward_over_sdpa"], "≥"),
        ("the same, forward and backward", goal["forward_backward_over_sdpa"], "≥"),
        ("the same, forward: times faster than compiled FlexAttention", goal["flex_over_gather"], "≥"),
        (
            "memory beside q, k and v at 16,384 tokens, times their size (the worst of ten cases)",
            memory["targets"]["times_q_k_v"],
            "≤",
        ),
        (
            "profiling SmolLM2 at 4,096 tokens, times one dense prefill",
            {**profile["time"], "reached": profile["time"]["ratio"]},
            "≤",
        ),
    ]
    lines = ["| `gather` and the profiler on this machine | reached | target | |", "|---|---:|---:|---|"]
    for what, row, sign in rows:
        lines.append(
            f"| {what} | {row['reached']:.2f} | {sign} {row['target']:.2f} | {'met' if row['met'] else 'missed'} |"
        )
    where = speed["provenance"]
    lines += [
        "",
        f"float32, {_machine(where['machine'])}, torch {where['torch']}, {where['date'][:10]}; sources in [`benchmarks/`](benchmarks/README.md).",
    ]
    return "\n".join(lines)


def load(name: str) -> dict[str, Any]:
    """One committed result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def blocks() -> dict[str, str]:
    """Every measured block of the README, by name."""
    return {"tune": tune_block(load("tune_smollm2_4096")), "speed": speed_block()}


def main(check: bool) -> int:
    readme = ROOT / "README.md"
    text = before = readme.read_text(encoding="utf-8")
    for name, body in blocks().items():
        text = replace_block(text, name, body)
    if check:
        return int(text != before or not PICTURE.is_file())
    readme.write_text(text, encoding="utf-8")
    picture(load("tune_smollm2_4096"), PICTURE)
    return 0


if __name__ == "__main__":
    stale = main("--check" in sys.argv[1:])
    if stale:
        print("README.md is stale: run python benchmarks/readme.py")
    sys.exit(stale)
