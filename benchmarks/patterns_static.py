"""How fast the patterns that follow from lengths alone are, beside torch's dense SDPA and compiled FlexAttention.

Usage: python benchmarks/patterns_static.py [--lengths 4096 8192 16384] [--repeats 5] [--patterns NAME …] [--no-flex]

8 heads of 64, float32; grids of 64×64, 64×128 and 128×128 tokens, frames of 32×32. Causal patterns stand beside causal dense attention,
the others beside full. ``gather`` and ``native`` are one call with the layout at hand, as layers and steps share it; what a kernel
prepares for a layout is made at its first call. Targets: ``gather`` at least 0.6 / tile density times faster than SDPA; ``native`` at
least 0.8 / tile density times faster than its own dense attention; building the layout at most 20 % of the faster one's time.
``first`` is the time of a first call, building and preparing included. ``flex`` is torch's compiled FlexAttention on the same blocks,
where the layout is one of blocks. ``error`` is the relative difference of ``native`` from ``gather``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveal
from foveal.bench.flex import flex_job
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import SHORT, Spread, interleaved, speedups
from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.core.layouts import Layout
from foveal.kernels import native
from foveal.patterns import Disc, FrameBand, Neighborhood, Pattern, SlidingWindow, neighborhood_layout
from foveal.patterns.presets import FLUX

HEADS, DIM, SEED = 8, 64, 0
TARGET, NATIVE_TARGET, SHARE = 0.6, 0.8, 0.2


@dataclass(frozen=True)
class Case:
    """A pattern for a length, and whether the model is causal."""

    pattern: Callable[[int], Pattern]
    causal: bool = False


def plane(length: int) -> tuple[int, int]:
    """The grid of powers of two that is nearest to a square."""
    side = 1 << (length.bit_length() - 1) // 2
    return side, length // side


def video(length: int) -> tuple[int, int, int]:
    return max(1, length // 1024), 32, 32


def window(length: int) -> tuple[int, int, int]:
    return min(4, video(length)[0]), 16, 16


CASES: dict[str, Case] = {
    "sliding_window": Case(lambda n: SlidingWindow(512, 4), causal=True),
    "triangle": Case(lambda n: FLUX["triangle"], causal=True),
    "neighborhood_1d": Case(lambda n: Neighborhood((n,), 512, stride=64)),
    "neighborhood_2d": Case(lambda n: Neighborhood(plane(n), 16, q_tile=(8, 8))),
    "neighborhood_2d_rows": Case(lambda n: Neighborhood(plane(n), 16)),
    "neighborhood_2d_stride": Case(lambda n: Neighborhood(plane(n), 16, stride=8, q_tile=(8, 8))),
    "neighborhood_2d_dilated": Case(lambda n: Neighborhood(plane(n), 16, dilation=2)),
    "neighborhood_2d_blocked": Case(lambda n: Neighborhood.blocked(plane(n), 16)),
    "neighborhood_3d": Case(lambda n: Neighborhood(video(n), window(n), q_tile=(2, 8, 8))),
    "neighborhood_3d_stride": Case(lambda n: Neighborhood(video(n), window(n), stride=(2, 8, 8), q_tile=(2, 8, 8))),
    "disc_r8": Case(lambda n: Disc(8, plane(n), tile=(8, 8))),
    "disc_r16": Case(lambda n: Disc(16, plane(n), tile=(8, 8))),
    "frame_band": Case(lambda n: FrameBand(1 / 32)),
}


def tensors(length: int) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(1, HEADS, length, DIM, generator=make) for _ in range(3))
    return q, k, v


def build(name: str, q: Tensor, k: Tensor) -> Layout | None:
    """The layout, made anew."""
    case, length = CASES[name], k.shape[2]
    neighborhood_layout.layout_of.cache_clear()
    base = BaseMask.build(length, length, causal=case.causal)
    return case.pattern(length).select(q, k, SelectContext(base), None)[0]


def measure_length(length: int, names: list[str], repeats: int, use_flex: bool) -> dict[str, Any]:
    q, k, v = tensors(length)
    impls = ("gather", "native") if native.unavailable() is None else ("gather",)
    jobs: dict[str, Callable[[], Any]] = {}
    for causal in sorted({CASES[name].causal for name in names}):
        kind = _kind(causal)
        jobs[f"sdpa {kind}"] = partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
        if len(impls) > 1:
            jobs[f"native {kind}"] = partial(foveal.attention, q, k, v, causal=causal, impl="native")
    layouts, by_flex = {name: build(name, q, k) for name in names}, {}
    for name, layout in layouts.items():
        causal = CASES[name].causal

        def first(impl: str, name: str = name, causal: bool = causal) -> Tensor:
            return foveal.attention(q, k, v, build(name, q, k), causal=causal, impl=impl)

        jobs[f"{name} building"] = partial(build, name, q, k)
        for impl in impls:
            jobs[f"{name} {impl}"] = partial(foveal.attention, q, k, v, layout, causal=causal, impl=impl)
            jobs[f"{name} first {impl}"] = partial(first, impl)
        if use_flex:
            job, by_flex[name] = flex_job(q, k, v, layout, BaseMask.build(length, length, causal=causal))
            if job is not None:
                jobs[f"{name} flex"] = job
    with torch.no_grad():
        seconds = interleaved(jobs, repeats, at_least=SHORT)
        out: dict[str, Any] = {
            name: {"milliseconds": _milliseconds(seconds, name)} for name in jobs if name.startswith("sdpa")
        }
        for name, layout in layouts.items():
            out[name] = row = _row(name, seconds, impls, layout, length)
            if len(impls) > 1:
                a, b = (jobs[f"{name} {impl}"]() for impl in impls)
                row["error"] = float((a - b).norm() / a.norm())
            if name in by_flex:
                row["flex"]["what"] = by_flex[name]
    return out


def _kind(causal: bool) -> str:
    return "causal" if causal else "full"


def _milliseconds(seconds: dict[str, list[float]], job: str) -> float:
    return Spread.of(seconds[job]).median * 1e3


def _row(
    name: str, seconds: dict[str, list[float]], impls: tuple[str, ...], layout: Layout | None, length: int
) -> dict[str, Any]:
    causal = CASES[name].causal
    kept = measure(layout, BaseMask.build(length, length, causal=causal), 1, HEADS)
    dense = {"gather": f"sdpa {_kind(causal)}", "native": f"native {_kind(causal)}"}
    building = _milliseconds(seconds, f"{name} building")
    share = building / _milliseconds(seconds, f"{name} {impls[-1]}")
    row: dict[str, Any] = {
        "pattern": CASES[name].pattern(length).to_json(),
        "layout": type(layout).__name__,
        "density": kept.density,
        "tile_density": kept.tile_density,
        "building": {"milliseconds": building, "share": share, "target": SHARE, "met": share <= SHARE},
    }
    for impl in impls:
        job = f"{name} {impl}"
        over_dense = speedups(seconds, dense[impl])[job]
        target = (TARGET if impl == "gather" else NATIVE_TARGET) / kept.tile_density
        row[impl] = {
            "milliseconds": _milliseconds(seconds, job),
            "first": _milliseconds(seconds, f"{name} first {impl}"),
            "times_faster_than_sdpa": speedups(seconds, dense["gather"])[job].json(),
            "over_own_dense" if impl == "native" else "over_sdpa": over_dense.json(),
            "target": target,
            "met": over_dense.median >= target,
        }
    if f"{name} flex" in seconds:
        fast = speedups(seconds, f"{name} flex")
        row["flex"] = {
            "milliseconds": _milliseconds(seconds, f"{name} flex"),
            "times_faster_than_flex": {impl: fast[f"{name} {impl}"].json() for impl in impls},
        }
    else:
        row["flex"] = {}
    return row


def _shown(name: str, row: dict[str, Any]) -> str:
    text = f"{name:24s} density {row['density']:.3f}, tiles {row['tile_density']:.3f}"
    for impl in ("gather", "native"):
        if impl in row:
            found = row[impl]
            reached = found.get("over_own_dense", found.get("over_sdpa"))["median"]
            text += f"; {impl} {found['milliseconds']:.1f} ms (first {found['first']:.1f}), {reached:.2f}×, target {found['target']:.2f}{'' if found['met'] else ' MISSED'}"
    text += f"; building {100 * row['building']['share']:.1f} %"
    for impl, times in row["flex"].get("times_faster_than_flex", {}).items():
        text += f", {impl} {times['median']:.2f}× flex"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patterns", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--no-flex", action="store_true", help="leave compiled FlexAttention out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "patterns_static.json")
    args = parser.parse_args()
    load = load_average()
    lengths: dict[str, Any] = {}
    for length in args.lengths:
        lengths[str(length)] = rows = measure_length(length, args.patterns, args.repeats, not args.no_flex)
        for name in args.patterns:
            print(f"{length:6d} {_shown(name, rows[name])}", flush=True)
    result = {
        "what": "patterns that follow from lengths against torch's dense SDPA, medians of interleaved runs",
        "shape": {"heads": HEADS, "head_dim": DIM, "dtype": "float32", "threads": torch.get_num_threads()},
        "load_before": load,
        "repeats": args.repeats,
        "seconds_at_least": SHORT,
        "lengths": lengths,
    }
    write_result(args.out, rounded(result))


if __name__ == "__main__":
    main()
