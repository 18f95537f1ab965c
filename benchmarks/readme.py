"""Fill the measured blocks of README and docs from the committed result files: ``python benchmarks/readme.py [--check]``.

Nothing here measures. ``--check`` writes nothing and exits with 1 when a page or the README's picture is stale.
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


def tune_block(name: str, picture: bool) -> str:
    """The table of one ``foveal tune`` run, with its provenance."""
    results = load(name)
    base = results["baseline"]
    lines = [f"![Speed against loss]({PICTURE.relative_to(ROOT).as_posix()})", ""] if picture else []
    lines += [
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
    between = (
        f"; baseline prefill {base['prefill_s']:.1f} s, decode {base['decode_tok_s']:.1f} tokens/s; "
        f"× is the speed-up over transformers' own `{base['name']}`"
    )
    return "\n".join([*lines, "", _tuned(name, results, between)])


def _tuned(name: str, results: dict[str, Any], between: str = "") -> str:
    """Where the figures of one ``foveal tune`` run come from."""
    where = results["provenance"]
    return (
        f"SmolLM2-135M-Instruct at {results['context']:,} tokens, {results['dtype']}, {results['text']['name']}{between}. "
        f"{_machine(results['machine'])}, torch {where['torch']}, transformers {where['transformers']}, {where['date'][:10]}. "
        f"Source: `benchmarks/results/{name}.json`."
    )


def methods_block(name: str) -> str:
    """How the search methods of one ``foveal tune --method all`` compare."""
    results = load(name)
    lines = [
        "| method | its best | density | prefill × | decode × | ppl | ppl, cached decode | |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in results["methods"]["rows"]:
        lines.append(
            f"| {row['method']} | {row['name']} | {row['density']:.2f} | {row['prefill_speedup']:.2f} | {row['decode_speedup']:.2f} "
            f"| {row['ppl_increase']:+.2%} | {row['decode_ppl_increase']:+.2%} | {row['verdict']} |"
        )
    said = f"**{results['methods']['said']}** {results['why']}"
    return "\n".join([*lines, "", said, "", _tuned(name, results)])


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


NATIVE = {
    "forward": "dense, 8,192 tokens",
    "causal": "causal, 4,096",
    "dim128": "dense, D = 128, 4,096",
    "length_2048": "dense, 2,048",
    "length_256": "dense, 256",
    "backward": "backward, 4,096",
    "decode": "decode, 128 MiB of cache (limit: reading)",
}
"""Cases of ``native_speed.json`` that the documentation shows."""


def native_block() -> str:
    """The C++ kernels beside SDPA and beside the machine's measured limit."""
    found = load("native_speed")
    lines = [
        "| case | float32: × SDPA | share of the limit | bfloat16: × SDPA | share of the limit |",
        "|---|---:|---:|---:|---:|",
    ]
    for case, what in NATIVE.items():
        cells = []
        for dtype in ("float32", "bfloat16"):
            row = found["cases"][f"{case}_{dtype}"]["native"]
            cells += [f"{row['times_faster_than_sdpa']['median']:.2f}", f"{row['best_share_of_peak']:.0%}"]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    where = found["provenance"]
    limits = [found["cases"][f"forward_{dtype}"] for dtype in ("float32", "bfloat16")]
    peak, sdpa = ([f"{row[name]['best_gflops']:.0f}" for row in limits] for name in ("peak", "sdpa"))
    lines += [
        "",
        f"The limit here: {peak[0]} GFLOP/s in float32, {peak[1]} in bfloat16; SDPA reaches {sdpa[0]} and {sdpa[1]} of it at 8,192 tokens. "
        f"{found['threads']} threads, 8 heads of 64, instruction set `{found['instruction_set']}`, {_machine(where['machine'])}, "
        f"torch {where['torch']}, {where['date'][:10]}; medians of turns, shares of the limit from the best turn. "
        "Source: `benchmarks/results/native_speed.json`.",
    ]
    return "\n".join(lines)


def sparse_block() -> str:
    """Block-sparse attention by the C++ kernels, at a tenth of the blocks."""
    found = load("native_speed")
    lines = [
        "| 10 % of the blocks, at random | time over density × own dense time | × compiled FlexAttention |",
        "|---|---:|---:|",
    ]
    for dtype in ("float32", "bfloat16"):
        for size in (64, 128):
            row = found["cases"][f"forward_{dtype}"][f"native_sparse_{size}"]
            over = row["time_over_dense"]["median"] / 0.1
            flex = row.get("times_faster_than_flex", {}).get("median")
            lines.append(f"| {dtype}, blocks of {size} | {over:.2f} | {'–' if flex is None else f'{flex:.2f}'} |")
    return "\n".join(lines)


LISTED = {
    "lists_64": "a tenth of the keys for each 64 rows",
    "documents": "31 packed documents",
    "groups": "64 rows with each of 4 blocks of 64 keys, overlapping",
}


def listed_block() -> str:
    """Lists and groups by the C++ kernels beside the same in plain PyTorch."""
    found = load("native_speed")
    lines = [
        "| 4,096 tokens, × `gather` | float32 | with gradients | bfloat16 | with gradients |",
        "|---|---:|---:|---:|---:|",
    ]
    for case, what in LISTED.items():
        cells = [
            f"{found['cases'][f'{kind}_{dtype}'][f'native_{case}']['times_faster_than_gather']['median']:.1f}"
            for dtype in ("float32", "bfloat16")
            for kind in ("listed", "listed_trained")
        ]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def masks_block() -> str:
    """The masks of LongCA-bench by foveal's kernels beside SDPA."""
    found = load("masks")
    at = {(row["mask"], row["length"], row["direction"]): row for row in found["cases"]}
    short, long = sorted({row["length"] for row in found["cases"]})
    lines = [
        f"| mask, {long:,} tokens | density | native, GFLOP/s | native × SDPA | gather × SDPA | {short:,} tokens: native × SDPA | the same, backward |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]

    def figure(row: dict[str, Any], impl: str, what: str, form: str) -> str:
        value = row["implementations"].get(impl, {}).get(what)
        return "–" if value is None else format(value, form)

    for mask in dict.fromkeys(row["mask"] for row in found["cases"]):
        row = at[mask, long, "forward"]
        cells = [figure(row, "native", "gflops", ".0f")]
        cells += [figure(row, impl, "times_faster_than_sdpa", ".2f") for impl in ("native", "gather")]
        cells += [
            figure(at[mask, short, d], "native", "times_faster_than_sdpa", ".2f") for d in ("forward", "backward")
        ]
        density = "–" if row["density"] is None else f"{row['density']:.3f}"
        lines.append(f"| `{mask}` | {density} | {' | '.join(cells)} |")
    where = found["provenance"]
    lines += [
        "",
        f"{found['heads']} query and {found['kv_heads']} key heads of {found['head_dim']}, {found['dtype']}, {found['threads']} threads, one draw of each "
        f"mask; SDPA gets a dense mask except for `full` and `causal`. {_machine(where['machine'])}, torch {where['torch']}, {where['date'][:10]}. "
        "Source: `benchmarks/results/masks.json`.",
    ]
    return "\n".join(lines)


def load(name: str) -> dict[str, Any]:
    """One committed result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def blocks() -> dict[str, dict[str, str]]:
    """Every measured block, by page and name."""
    native = native_block()
    measured = {"docs/bench.md": {"masks": masks_block()}} if (RESULTS / "masks.json").is_file() else {}
    return {
        **measured,
        "README.md": {"tune": tune_block("tune_smollm2_4096", True), "speed": speed_block(), "native": native},
        "docs/native.md": {
            "native": native,
            "native-sparse": sparse_block(),
            "native-listed": listed_block(),
            "tune-8192": tune_block("tune_smollm2_8192_bf16", False),
        },
        "docs/tune.md": {"tune-methods": methods_block("tune_smollm2_4096_methods")},
        "docs/hylra.md": {"tune-hylra": tune_block("tune_smollm2_8192_bf16_hylra", False)},
    }


def main(check: bool) -> int:
    stale = not PICTURE.is_file()
    for page, parts in blocks().items():
        path = ROOT / page
        text = before = path.read_text(encoding="utf-8")
        for name, body in parts.items():
            text = replace_block(text, name, body)
        stale = stale or text != before
        if not check:
            path.write_text(text, encoding="utf-8")
    if check:
        return int(stale)
    picture(load("tune_smollm2_4096"), PICTURE)
    return 0


if __name__ == "__main__":
    stale = main("--check" in sys.argv[1:])
    if stale:
        print("README.md, a page of docs or the picture is stale: run python benchmarks/readme.py")
    sys.exit(stale)
