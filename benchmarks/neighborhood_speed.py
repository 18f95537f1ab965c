"""How fast neighborhood attention is: against torch's dense SDPA and the natten package's same operator, in turns, in one run.

Usage: python benchmarks/neighborhood_speed.py [--cases NAME …] [--repeats 7] [--scale 1.0] [--no-flex] [--out benchmarks/results/neighborhood_speed.json]

The first case carries the targets: 64×64 tokens, window 16, stride 8, 8 heads of 64, float32. Four ways to run it:

- ``rows``: tokens stay where they are; one exact key list per stride group.
- ``tiles``: tokens are permuted into 8×8 tiles and back inside the measured time (once per layer); exact lists.
- ``ordered``: tokens are in tile order already (permuted once per model); whole key tiles of 4×4 and no mask.
- ``blocks``: the same with key tiles of 8×8, which the windows cut: what tiles alone can do.

``flex`` is torch's compiled FlexAttention, forward, on the blocks of the last way; a key list is nothing that it takes.

``layout_share`` is the time to build the layout over the time of its attention; it is then kept. ``natten`` runs where it can be
imported (where it does not build, its source distribution unpacked and put on PYTHONPATH is enough): on CPU it has FlexAttention
without a compiler and nothing else (its CPU kernels left after 0.17, which had no stride).
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal import attention
from foveal.bench.flex import flex_job
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.core.layouts import BlockMask
from foveal.patterns import Neighborhood, neighborhood_layout

SEED, DIM = 0, 64
TARGETS = {"forward_over_sdpa": 9.0, "forward_over_natten": 3.0, "layout_share_at_most": 0.2}


@dataclass(frozen=True)
class Case:
    """One grid with its window and stride, and tile shapes for queries, aligned keys and plain keys."""

    name: str
    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    q_tile: tuple[int, ...]
    aligned: tuple[int, ...]
    heads: int = 8
    natten: bool = False
    causal: bool | tuple[bool, ...] = False

    def scaled(self, factor: float) -> Case:
        sizes = (self.grid, self.window, self.stride, self.q_tile, self.aligned)
        grid, window, stride, q_tile, aligned = (tuple(max(1, round(n * factor)) for n in x) for x in sizes)
        return Case(self.name, grid, window, stride, q_tile, aligned, self.heads, self.natten, self.causal)


CASES = [
    Case("2d_64x64_w16_s8", (64, 64), (16, 16), (8, 8), (8, 8), (4, 4), natten=True),
    Case("2d_64x64_w16_s1", (64, 64), (16, 16), (1, 1), (8, 8), (8, 8)),
    Case("2d_64x64_w16_blocked", (64, 64), (16, 16), (16, 16), (8, 8), (8, 8)),
    Case("1d_8192_w512_s256", (8192,), (512,), (256,), (128,), (128,)),
    Case("1d_8192_w512_s1", (8192,), (512,), (1,), (128,), (128,)),
    Case("3d_8x32x32_w4x16x16_s2x8x8", (8, 32, 32), (4, 16, 16), (2, 8, 8), (2, 8, 8), (1, 4, 4)),
    Case("3d_8x32x32_causal_time", (8, 32, 32), (4, 16, 16), (1, 8, 8), (2, 8, 8), (2, 4, 4), causal=(True, False, False)),
]  # fmt: skip


def natten_job(
    case: Case, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any] | None = None
) -> tuple[Callable[[], Tensor] | None, str]:
    """The package's operator on heads-last copies, or why there is none.

    Args:
        options: its keywords; by default those of its only path on CPU.
    """
    try:
        import natten
    except ImportError:
        return None, "natten is not installed here"
    call = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[len(case.grid)]
    grids = [x.transpose(1, 2).unflatten(1, case.grid).contiguous() for x in (q, k, v)]
    on_cpu = {"backend": "flex-fna", "q_tile_shape": case.q_tile, "kv_tile_shape": case.q_tile}

    def job() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(*grids, kernel_size=case.window, stride=case.stride, **(options or on_cpu))

    try:
        job()
    except Exception as error:
        return None, f"natten {natten.__version__} cannot run it here: {error}"
    path = "" if options else ", FlexAttention without a compiler, its only path on CPU"
    return job, f"natten {natten.__version__}{path}"


def ways(case: Case) -> dict[str, Neighborhood]:
    plain = Neighborhood(case.grid, case.window, case.stride, 1, case.causal)
    out = {"rows": plain} if math.prod(case.stride) >= 16 and not case.causal else {}
    if len(case.grid) > 1:
        out["tiles"] = plain.tiled(case.q_tile)
        out["ordered"] = plain.tiled(case.q_tile, case.aligned)
        out["blocks"] = Neighborhood(
            case.grid, case.window, case.stride, 1, case.causal, 0, case.q_tile, layout="blocks"
        )
    return out or {"rows": plain}


def measure_case(case: Case, repeats: int, use_flex: bool) -> dict[str, Any]:
    make = torch.Generator().manual_seed(SEED)
    tokens = math.prod(case.grid)
    q, k, v = (torch.randn(1, case.heads, tokens, DIM, generator=make) for _ in range(3))
    upstream = torch.randn(q.shape, generator=make)
    exact = attention(q[:, :1].double(), k[:, :1].double(), v[:, :1].double(), Neighborhood(case.grid, case.window, case.stride, 1, case.causal))  # fmt: skip
    runs: dict[str, Callable[..., Tensor]] = {"sdpa": torch.nn.functional.scaled_dot_product_attention}
    report: dict[str, Any] = {}
    job, flex_is = None, "no way of this case keeps whole blocks" if use_flex else "left out"
    inputs = {"sdpa": (q, k, v)}
    for name, pattern in ways(case).items():
        inputs[name] = (q, k, v)
        orders = pattern.tilings() if pattern.q_tile else None
        if name == "tiles" and orders:
            a, b = orders
            runs[name] = lambda q, k, v, a=a, b=b, p=pattern: a.restore(attention(a.permute(q), b.permute(k), b.permute(v), p))  # fmt: skip
        else:
            runs[name] = lambda q, k, v, p=pattern: attention(q, k, v, p)
            if orders:
                inputs[name] = (orders[0].permute(q), orders[1].permute(k), orders[1].permute(v))
        out = runs[name](*inputs[name])
        out = orders[0].restore(out) if orders and name != "tiles" else out
        lengths = inputs[name][0].shape[2], inputs[name][1].shape[2]
        lengths = (orders[0].length, orders[1].length) if orders else lengths
        base = BaseMask.build(*lengths, causal=False)

        def select(pattern: Neighborhood = pattern, base: BaseMask = base) -> Any:
            neighborhood_layout.layout_of.cache_clear()
            return pattern.select(q, k, SelectContext(base))[0]

        layout = select()
        if use_flex and isinstance(layout, BlockMask):
            job, flex_is = flex_job(*inputs[name], layout, base)
        kept = measure(layout, base, 1, case.heads, case.heads)
        report[name] = {
            "layout": type(layout).__name__,
            "density": kept.density,
            "tile_density": kept.tile_density,
            "error": float((out[:, :1].double() - exact).abs().max()),
        }
        report[name]["layout_milliseconds"] = 1e3 * Spread.of(interleaved({"x": select}, 3)["x"]).median
    with torch.no_grad():
        jobs = {name: (lambda run=run, x=inputs[name]: run(*x)) for name, run in runs.items()}
        if job is not None:
            jobs["flex"] = job
        row = _report(interleaved(jobs, repeats), report, "forward")
        row["flex"] = flex_is
        if case.natten:
            rival, row["natten"] = natten_job(case, q, k, v)
            if rival is not None:
                seconds = interleaved({"natten": rival, "rows": jobs["rows"]}, 2, warmup=0)
                error = rival().flatten(1, -3).transpose(1, 2)[:, :1].double() - exact
                row["over_natten"] = {
                    **speedups(seconds, "natten")["rows"].json(),
                    "natten_error": float(error.abs().max()),
                }
    both = {name: with_gradients(run, inputs[name], upstream if name != "ordered" and name != "blocks" else None) for name, run in runs.items()}  # fmt: skip
    row.update(_report(interleaved(both, max(3, repeats // 2)), {}, "forward_backward"))
    row["shape"] = {"grid": list(case.grid), "window": list(case.window), "stride": list(case.stride), "causal": case.causal, "heads": case.heads, "head_dim": DIM, "dtype": "float32"}  # fmt: skip
    for name in report:
        row["ways"][name]["layout_share"] = report[name]["layout_milliseconds"] / row["forward"][name]["milliseconds"]["median"]  # fmt: skip
    return row


def with_gradients(
    run: Callable[..., Tensor], tensors: tuple[Tensor, ...], upstream: Tensor | None
) -> Callable[[], Any]:
    def job() -> Any:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out) if upstream is None else upstream)

    return job


def _report(seconds: dict[str, list[float]], ways: dict[str, Any], what: str) -> dict[str, Any]:
    fast = speedups(seconds, "sdpa")
    rows = {
        name: {
            "milliseconds": {k: v * 1e3 if k != "count" else v for k, v in Spread.of(values).json().items()},
            "times_faster_than_sdpa": fast[name].json(),
        }
        for name, values in seconds.items()
    }
    return {what: rows, **({"ways": ways} if ways else {})}


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """The targets beside what the first case reached."""
    share = row["ways"]["rows"]["layout_share"]
    reached = {"forward_over_sdpa": row["forward"]["rows"]["times_faster_than_sdpa"]["median"]}
    if "over_natten" in row:
        reached["forward_over_natten"] = row["over_natten"]["median"]
    out = {n: {"target": TARGETS[n], "reached": value, "met": value >= TARGETS[n]} for n, value in reached.items()}
    most = TARGETS["layout_share_at_most"]
    out["layout_share_at_most"] = {"target": most, "reached": share, "met": share <= most}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="factor of grids and windows, for trying the script out"
    )
    parser.add_argument("--no-flex", action="store_true", help="leave compiled FlexAttention out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "neighborhood_speed.json")
    args = parser.parse_args()
    load = load_average()
    rows = {}
    for case in CASES:
        if args.cases and case.name not in args.cases:
            continue
        rows[case.name] = row = measure_case(case.scaled(args.scale), args.repeats, not args.no_flex)
        text = ", ".join(
            f"{name} {row['forward'][name]['times_faster_than_sdpa']['median']:.2f}× "
            f"({row['forward_backward'][name]['times_faster_than_sdpa']['median']:.2f}× with backward)"
            for name in row["ways"]
        )
        if "flex" in row["forward"]:
            text += f", flex {row['forward']['flex']['times_faster_than_sdpa']['median']:.2f}×"
        print(f"{case.name:28s} {text}", flush=True)
    first = rows.get(CASES[0].name)
    result = {
        "what": "neighborhood attention against torch's dense SDPA, medians of interleaved runs",
        "targets": verdict(first) if first else {},
        "load_before": load,
        "repeats": args.repeats,
        "cases": rows,
    }
    write_result(args.out, rounded(result))
    for name, target in result["targets"].items():
        print(f"{name}: {target['reached']:.3g}, target {target['target']:g}: {'met' if target['met'] else 'MISSED'}")


if __name__ == "__main__":
    main()
