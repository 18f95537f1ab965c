"""The patterns on a CUDA GPU: how fast each implementation runs them beside SDPA's best backend, and beside natten on grids.

Usage: python benchmarks/patterns_gpu.py [--lengths 4096 8192 16384] [--repeats 10] [--cases NAME …] [--impls NAME …] [--device cuda]
       [--dtype bfloat16] [--out benchmarks/results/patterns_gpu.json]

8 heads of 64, bfloat16, forward. The patterns that choose by content are those of ``patterns_dynamic.py``, on its queries and keys; the
grids and windows are those of ``neighborhood_speed.py``. Every implementation that takes a layout runs it; what cannot run stands in
``cannot_run`` with its reason. ``sdpa`` is the fastest of torch's dense backends in the same run, named beside it, under the pattern's own
base mask. ``efficiency`` is the speed-up over it times the tile density: 1 when time follows the tiles. ``difference`` is the largest one
from ``gather`` in float32 on the same layout; ``choosing_milliseconds`` is the selection, or the building of a static layout.
``--device cpu`` tries the script out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from neighborhood_speed import CASES as GRIDS
from neighborhood_speed import Case as Grid
from neighborhood_speed import natten_job, ways
from patterns_dynamic import CASES as CHOOSING
from patterns_dynamic import DIM, HEADS, select, tensors
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import foveal
from foveal.bench.peaks import machine_peaks
from foveal.bench.results import rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.core.layouts import Layout
from foveal.kernels import IMPLEMENTATIONS
from foveal.patterns import neighborhood_layout

DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
Job = Callable[[], Any]


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool, backend: SDPBackend) -> Job:
    def job() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return job


def compare(
    tensors: tuple[Tensor, ...],
    layout: Layout | None,
    base: BaseMask,
    choose: Job,
    impls: list[str],
    repeats: int,
    rivals: dict[str, Job],
) -> dict[str, Any]:
    """One layout by every implementation, the dense backends and ``rivals``, in turns.

    Args:
        tensors: q, k and v ``(1, H, N, D)``. choose: makes the layout afresh.
    """
    causal = base.causal
    jobs: dict[str, Job] = {f"sdpa {name}": dense(*tensors, causal, backend) for name, backend in DENSE.items()}
    for impl in impls:
        jobs[impl] = lambda impl=impl: foveal.attention(*tensors, layout, causal=causal, impl=impl)  # type: ignore[misc]
    jobs |= rivals
    exact = foveal.attention(*(x.float() for x in tensors), layout, causal=causal, impl="gather")
    cannot, difference = {}, {}
    for name in list(jobs):
        try:
            out = jobs[name]()
        except Exception as error:  # the reason goes into the result; a benchmark compares what runs
            cannot[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            del jobs[name]
            continue
        if name in impls:
            difference[name] = float((out.float() - exact).abs().max())
    seconds = interleaved({**jobs, "choosing": choose}, repeats, warmup=2, device=tensors[0].device)
    median = {name: Spread.of(values).median for name, values in seconds.items()}
    best = min((name for name in jobs if name.startswith("sdpa ")), key=lambda name: median[name])
    kept = measure(layout, base, 1, HEADS)
    faster = speedups(seconds, best)
    row: dict[str, Any] = {
        "layout": type(layout).__name__,
        "density": kept.density,
        "tile_density": kept.tile_density,
        "sdpa": {"backend": best.removeprefix("sdpa "), "milliseconds": 1e3 * median[best]},
        "choosing_milliseconds": 1e3 * median["choosing"],
        "cannot_run": cannot,
    }
    for name in jobs:
        if name.startswith("sdpa "):
            continue
        row[name] = {"milliseconds": 1e3 * median[name], "times_faster_than_sdpa": faster[name].json()}
        if name in difference:
            row[name] |= {
                "efficiency": faster[name].median * kept.tile_density,
                "exact_tflops": 4 * DIM * kept.pairs / median[name] / 1e12,
                "difference": difference[name],
            }
    return row


def choosing(name: str, length: int, impls: list[str], repeats: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One pattern that chooses by content."""
    q, k, v = (x.to(device, dtype) for x in tensors(length))
    case = CHOOSING[name]
    base = BaseMask.build(length, length, causal=case.causal, device=device)
    causal_base = BaseMask.build(length, length, causal=True, device=device)
    earlier = CHOOSING["block_topk"].pattern(length).select(q, k, SelectContext(causal_base), None)[0]

    choose = partial(select, name, q, k, earlier)
    return compare((q, k, v), choose(), base, choose, impls, repeats, {})


def neighborhood(
    case: Grid, impls: list[str], repeats: int, device: str, dtype: torch.dtype
) -> dict[str, dict[str, Any]]:
    """One grid in every order of its tokens that ``neighborhood_speed.py`` knows, without the cost of ordering."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, case.heads, math.prod(case.grid), DIM, generator=make).to(device, dtype) for _ in range(3)
    )
    natten, why = natten_job(case, q, k, v, {"is_causal": case.causal})
    rows = {}
    for name, pattern in ways(case).items():
        if name == "tiles":
            continue  # ``ordered`` with other key tiles, and the reordering inside the time
        orders = pattern.tilings() if pattern.q_tile else None
        ordered = (orders[0].permute(q), orders[1].permute(k), orders[1].permute(v)) if orders else (q, k, v)
        base = BaseMask.build(ordered[0].shape[2], ordered[1].shape[2], causal=False, device=device)

        def choose(pattern: Any = pattern, base: BaseMask = base, x: tuple[Tensor, ...] = ordered) -> Layout | None:
            neighborhood_layout.layout_of.cache_clear()
            return pattern.select(x[0], x[1], SelectContext(base))[0]

        rivals = {} if natten is None else {"natten": natten}
        rows[name] = compare(ordered, choose(), base, choose, impls, repeats, rivals)
        if natten is None:
            rows[name]["cannot_run"]["natten"] = why
    return rows


def show(title: str, row: dict[str, Any]) -> None:
    cells = (
        f"{name} {cell['times_faster_than_sdpa']['median']:.2f}×"
        + (f" ({cell['efficiency']:.2f} of its tiles)" if "efficiency" in cell else "")
        for name, cell in row.items()
        if isinstance(cell, dict) and "times_faster_than_sdpa" in cell
    )
    print(f"{title:34s} tiles {row['tile_density']:.3f}  sdpa {row['sdpa']['backend']} {row['sdpa']['milliseconds']:.2f} ms  {', '.join(cells)}", flush=True)  # fmt: skip
    for what, reason in row["cannot_run"].items():
        print(f"       {what}: {reason}")


def main() -> None:
    names = [name for name, case in CHOOSING.items() if not case.decode]
    grids = {case.name: case for case in GRIDS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--cases", nargs="+", choices=[*names, *grids], default=[*names, *grids])
    parser.add_argument("--impls", nargs="+", choices=list(IMPLEMENTATIONS), default=["flex", "triton", "gather"])
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of grids and windows, for trying the script out"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "patterns_gpu.json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("patterns_gpu.py needs a CUDA GPU, and torch sees none here; run it on a machine with one.")
    dtype = getattr(torch, args.dtype)
    rows: dict[str, Any] = {}
    with torch.no_grad():
        for name in (name for name in args.cases if name in CHOOSING):
            for length in args.lengths:
                torch.compiler.reset()
                rows[f"{name} {length}"] = choosing(name, length, args.impls, args.repeats, args.device, dtype)
                show(f"{name} {length}", rows[f"{name} {length}"])
        for name in (name for name in args.cases if name in grids):
            torch.compiler.reset()
            case = grids[name].scaled(args.scale)
            for way, row in neighborhood(case, args.impls, args.repeats, args.device, dtype).items():
                rows[f"{name} {way}"] = row
                show(f"{name} {way}", row)
    result = {
        "what": "the patterns against the best of torch's dense backends, forward, medians of interleaved runs",
        "shape": {"heads": HEADS, "head_dim": DIM, "dtype": args.dtype, "device": args.device},
        "peaks": machine_peaks(args.device),
        "cases": rows,
    }
    write_result(args.out, rounded(result))


if __name__ == "__main__":
    main()
