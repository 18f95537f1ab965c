"""How fast the attentions of diffusion models are beside torch's dense SDPA: CLEAR's discs, Re-ttention and SparseD.

Usage: python benchmarks/patterns_diffusion.py [--cases NAME …] [--repeats 7] [--side 64] [--no-flex] [--out benchmarks/results/patterns_diffusion.json]

64×64 image tokens after 128 text tokens, 8 heads of 64, float32, one thread per core. Every job is one attention layer:

- ``disc_r8``, ``disc_r16``: tokens in 8×8 tiles (permuted once per model); ``_rows``: row-major, blocks of 128. ``pooled_r8``: with tokens
  pooled 4×4.
- ``rettention_*``: a band of 3.1 % of the image. ``sparse`` step with ratio and residual, ``refresh`` step, and what the whole run of the
  three published schedules costs beside a dense run.
- ``sparsed_*``: 30 % and 50 % of the blocks. ``sparse`` step with the mask at hand, ``mask`` step with its dense attention.

``flex`` is torch's compiled FlexAttention on the pattern's blocks, beside one call of foveal's own attention on them (``attention``).
``cached`` runs with the layout at hand, as all layers and steps of a model do; ``first`` also builds the layout and the kernel's tile
plan. ``layout_share`` is the time to build the layout over the cached time. ``error`` is the largest difference of one head from the
float64 reference of the same method.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveal
from foveal.bench.flex import flex_job
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.patterns import Disc, FrameBand, Operator, Pattern, PooledDisc, Rettention, SparseD, attend

HEADS, DIM, TEXT, SEED = 8, 64, 128, 0
SPEED, SHARE = 0.6, 0.2
SCHEDULES = {"pixart": (20, 5), "hunyuan": (50, 10), "cogvideox": (50, 15)}


def cases(side: int) -> dict[str, Pattern | Operator]:
    grid = (side, side)
    return {
        "disc_r8": Disc(8, grid, TEXT, (8, 8)),
        "disc_r8_rows": Disc(8, grid, TEXT),
        "disc_r16": Disc(16, grid, TEXT, (8, 8)),
        "disc_r16_rows": Disc(16, grid, TEXT),
        "pooled_r8": PooledDisc(Disc(8, grid, TEXT, (8, 8))),
        "rettention_sparse": Rettention(FrameBand(1 / 32, text=TEXT), warmup=0),
        "rettention_refresh": Rettention(FrameBand(1 / 32, text=TEXT), warmup=0),
        "sparsed_30": SparseD(keep=0.3, generated=TEXT),
        "sparsed_50": SparseD(keep=0.5, generated=TEXT, block=32),
        "sparsed_30_mask": SparseD(keep=0.3, generated=TEXT),
    }


def kept_by(method: Pattern | Operator) -> Pattern | None:
    """The pattern whose density describes the method."""
    if isinstance(method, Pattern):
        return method
    return method.disc if isinstance(method, PooledDisc) else method.pattern if isinstance(method, Rettention) else None


def steps_of(name: str, method: Pattern | Operator) -> tuple[int | None, int | None]:
    """The step before, whose state is at hand, and the step measured."""
    if isinstance(method, Rettention):
        return (0, 1) if name.endswith("sparse") else (None, 0)
    if isinstance(method, SparseD):
        return (None, method.last_dense) if name.endswith("mask") else (method.last_dense, method.last_dense + 1)
    return None, None


def measure_case(
    name: str, method: Pattern | Operator, tensors: tuple[Tensor, ...], repeats: int, use_flex: bool
) -> dict[str, Any]:
    q, k, v = tensors
    length = q.shape[2]
    before, step = steps_of(name, method)
    cached = BaseMask.build(length, length, causal=False)

    def context(base: BaseMask, step: int | None) -> SelectContext:
        return SelectContext(base, step=step)

    state = None if before is None else attend(method, q, k, v, context(cached, before))[2]

    def run(base: BaseMask | None = None) -> Tensor:
        base = BaseMask.build(length, length, causal=False) if base is None else base
        return attend(method, q, k, v, context(base, step), state)[0]

    jobs: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "cached": lambda: run(cached),
        "first": run,
    }
    pattern = kept_by(method)
    assert pattern is not None

    def select() -> Any:
        base = BaseMask.build(length, length, causal=False)
        own = state if pattern is method else None
        return pattern.select(q, k, context(base, step if pattern is method else None), own)[0]

    jobs["layout"] = select
    chosen, by_flex = select(), "left out"
    if use_flex:
        job, by_flex = flex_job(q, k, v, chosen, cached)
        if job is not None:
            jobs["flex"] = job
            jobs["attention"] = lambda: foveal.attention(q, k, v, chosen)
    seconds = interleaved(jobs, repeats)
    fast = speedups(seconds, "sdpa")
    kept = measure(chosen, cached, 1, HEADS, HEADS)
    time = {job: Spread.of(values) for job, values in seconds.items()}
    row: dict[str, Any] = {
        "method": method.to_json(),
        "density": kept.density,
        "tile_density": kept.tile_density,
        "milliseconds": {job: 1e3 * spread.median for job, spread in time.items()},
        "times_faster_than_sdpa": {job: fast[job].json() for job in ("cached", "first")},
        "layout_share": time["layout"].median / time["cached"].median,
        "share_of_tile_bound": fast["cached"].median * kept.tile_density,
        "error": error_of(method, tensors, before, step, run(cached)),
    }
    row["flex"] = by_flex
    if "flex" in seconds:
        row["attention_over_flex"] = speedups(seconds, "flex")["attention"].json()
    return row


def error_of(
    method: Pattern | Operator, tensors: tuple[Tensor, ...], before: int | None, step: int | None, out: Tensor
) -> float | None:
    """Largest difference from the float64 reference, first head; SparseD's heads are compared on the same blocks."""
    q, k, v = (t[:, :1] for t in tensors)
    base = BaseMask.build(q.shape[2], k.shape[2], causal=False)
    state = None
    for now in [s for s in (before, step) if s is not None] or [None]:
        exact, _, state = attend(method, q, k, v, SelectContext(base, step=now), state, impl="reference")
    return float((out[:, :1] - exact).abs().max())


def verdict(rows: dict[str, Any]) -> dict[str, Any]:
    """The targets beside what was reached: share of the tile bound, and the share of building static layouts."""
    found = {}
    for name, row in rows.items():
        if name.startswith("disc") or name in ("rettention_sparse", "sparsed_30", "sparsed_50"):
            reached = row["share_of_tile_bound"]
            found[f"{name}: speed-up × tile density"] = {"target": SPEED, "reached": reached, "met": reached >= SPEED}
        if name.startswith("disc"):
            reached = row["layout_share"]
            found[f"{name}: layout share at most"] = {"target": SHARE, "reached": reached, "met": reached <= SHARE}
    return found


def whole_runs(sparse: float) -> dict[str, float]:
    """Attention time of published schedules over that of a dense run, with the measured cost of a sparse step."""
    return {
        name: Rettention(FrameBand(), warmup=warmup).run_cost(steps, sparse)
        for name, (steps, warmup) in SCHEDULES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(cases(64)), help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--side", type=int, default=64, help="image tokens per side, a multiple of 8")
    parser.add_argument("--no-flex", action="store_true", help="leave compiled FlexAttention out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "patterns_diffusion.json")
    args = parser.parse_args()
    load = load_average()
    make = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(1, HEADS, TEXT + args.side**2, DIM, generator=make) for _ in range(3))
    rows: dict[str, Any] = {}
    with torch.no_grad():
        for name, method in cases(args.side).items():
            if args.cases and name not in args.cases:
                continue
            rows[name] = row = measure_case(name, method, (q, k, v), args.repeats, not args.no_flex)
            ms = row["milliseconds"]
            print(
                f"{name:20s} density {row['density']:.3f} tiles {row['tile_density']:.3f}  {ms['cached']:7.1f} ms, "
                f"{row['times_faster_than_sdpa']['cached']['median']:5.2f}× SDPA, first {ms['first']:7.1f} ms, layout {ms['layout']:6.1f} ms, "
                f"error {row['error']:.1e}"
                + (f", {row['attention_over_flex']['median']:.2f}× flex" if "attention_over_flex" in row else ""),
                flush=True,
            )
    result: dict[str, Any] = {
        "what": "attentions of diffusion models against torch's dense SDPA, medians of interleaved runs",
        "shape": {"image": [args.side, args.side], "text": TEXT, "heads": HEADS, "head_dim": DIM, "dtype": "float32"},
        "targets": verdict(rows),
        "block_masks_run_by": foveal.explain(q, k, v, Disc(8, (args.side, args.side), TEXT)).impl,
        "load_before": load,
        "repeats": args.repeats,
        "cases": rows,
    }
    if "rettention_sparse" in rows:
        cost = 1 / rows["rettention_sparse"]["times_faster_than_sdpa"]["cached"]["median"]
        result["rettention_whole_run_over_dense"] = whole_runs(cost)
    write_result(args.out, rounded(result))
    for name, target in result["targets"].items():
        print(f"{name}: {target['reached']:.2f}, target {target['target']:.2f}: {'met' if target['met'] else 'MISSED'}")


if __name__ == "__main__":
    main()
