"""How fast ``gather`` is: against torch's dense SDPA and compiled FlexAttention, in turns, in one run.

Usage: python benchmarks/gather_speed.py [--cases NAME …] [--repeats 7] [--no-flex] [--scale 1.0] [--out benchmarks/results/gather_speed.json]

The first case carries the targets: 8192 tokens, 8 heads of 64, float32, blocks of 128, a tenth of the blocks at random per
head. The others are what models meet: causal, 9 query heads on 3 key heads, a sliding window and random blocks.
FlexAttention is called as compiled by torch with the finished ``BlockMask``; it has no backward on CPU.

GFLOP/s count exactly the visible pairs: ``4·D`` operations per pair forward, ``10·D`` more backward (five products), and the
same work in one matrix product per second is this machine's limit, measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveal
from foveal.bench.flex import flex_job
from foveal.bench.peaks import machine_peaks
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.core.base_mask import FULL, BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.core.layouts import BlockMask, block_mask
from foveal.kernels import flex
from foveal.patterns import SlidingWindow

BLOCK, DIM, SEED = 128, 64, 0
TARGETS = {"forward_over_sdpa": 6.0, "flex_over_gather": 1 / 1.3, "forward_backward_over_sdpa": 4.0}


@dataclass(frozen=True)
class Case:
    """One shape and mask: ``density`` of random blocks, or a ``window``."""

    name: str
    length: int
    heads: int
    kv_heads: int
    causal: bool
    density: float | None = None
    window: int | None = None
    dtype: torch.dtype = torch.float32
    backward: bool = False

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        make = torch.Generator().manual_seed(SEED)
        shapes = (self.heads, self.kv_heads, self.kv_heads)
        q, k, v = (torch.randn(1, h, self.length, DIM, generator=make).to(self.dtype) for h in shapes)
        return q, k, v

    def mask(self, base: BaseMask) -> BlockMask:
        """Random per head, the diagonal and first blocks always kept when causal; or the window's own mask."""
        if self.window is not None:
            layout, _ = SlidingWindow(self.window, sinks=4).select(
                torch.empty(0), torch.empty(0), SelectContext(base=base)
            )
            assert isinstance(layout, BlockMask)
            return layout
        assert self.density is not None
        blocks = -(-self.length // BLOCK)
        make = torch.Generator().manual_seed(SEED)
        kept = torch.rand(1, self.heads, blocks, blocks, generator=make) < self.density
        if self.causal:
            kept = (kept | torch.eye(blocks, dtype=torch.bool)).tril()
            kept[..., 0] = True
        return block_mask(kept.to(torch.int8) * FULL, (BLOCK, BLOCK), (self.length, self.length))


CASES = [
    Case("random_10", 8192, 8, 8, False, density=0.10, backward=True),
    *(Case(f"window_1024_{n}", n, 9, 3, True, window=1024) for n in (4096, 8192, 16384)),
    *(
        Case(f"causal_random_{round(100 * d)}_{n}", n, 9, 3, True, density=d)
        for n in (4096, 16384)
        for d in (0.125, 0.25)
    ),
    Case("window_1024_8192_bf16", 8192, 9, 3, True, window=1024, dtype=torch.bfloat16),
    Case("causal_random_12_8192_bf16", 8192, 9, 3, True, density=0.125, dtype=torch.bfloat16),
    Case("causal_random_12_8192_backward", 8192, 9, 3, True, density=0.125, backward=True),
]


def with_gradients(run: Callable[..., Tensor], tensors: tuple[Tensor, ...], upstream: Tensor) -> Callable[[], Any]:
    def job() -> Any:
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(run(*leaves), leaves, upstream)

    return job


def measure_case(case: Case, repeats: int, use_flex: bool) -> dict[str, Any]:
    q, k, v = case.tensors()
    base = BaseMask.build(case.length, case.length, causal=case.causal)
    mask = case.mask(base)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)

    def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return foveal.attention(q, k, v, mask, causal=case.causal, impl="gather")

    jobs: dict[str, Callable[[], Any]] = {"sdpa": lambda: sdpa(q, k, v), "gather": lambda: gather(q, k, v)}
    if use_flex:
        job, _ = flex_job(q, k, v, mask, base)
        assert job is not None  # `use_flex` says that it runs here, and `mask` is a BlockMask
        jobs["flex"] = job
    with torch.no_grad():
        forward = interleaved(jobs, repeats)
    kept = measure(mask, base, 1, case.heads, case.kv_heads)
    dense = kept.allowed
    row: dict[str, Any] = {
        "shape": {
            "length": case.length,
            "heads": case.heads,
            "kv_heads": case.kv_heads,
            "head_dim": DIM,
            "dtype": str(case.dtype)[6:],
        },
        "causal": case.causal,
        "density": kept.density,
        "tile_density": kept.tile_density,
        "forward": _report(forward, 4 * DIM, {"sdpa": dense}, kept.pairs),
    }
    if case.backward:
        make = torch.Generator().manual_seed(SEED + 1)
        upstream = torch.randn(q.shape, generator=make).to(case.dtype)
        both = {name: with_gradients(run, (q, k, v), upstream) for name, run in (("sdpa", sdpa), ("gather", gather))}
        row["forward_backward"] = _report(
            interleaved(both, max(3, repeats // 2)), 14 * DIM, {"sdpa": dense}, kept.pairs
        )
    return row


def _report(seconds: dict[str, list[float]], per_pair: int, pairs: dict[str, int], kept: int) -> dict[str, Any]:
    fast, by_flex = speedups(seconds, "sdpa"), speedups(seconds, "flex") if "flex" in seconds else {}
    out: dict[str, Any] = {}
    for name, values in seconds.items():
        time = Spread.of(values)
        out[name] = {
            "milliseconds": {k: v * 1e3 if k != "count" else v for k, v in time.json().items()},
            "times_faster_than_sdpa": fast[name].json(),
            "exact_gflops": per_pair * pairs.get(name, kept) / time.median / 1e9,
        }
        if by_flex and name == "gather":
            out[name]["times_faster_than_flex"] = by_flex[name].json()
    return out


def verdict(row: dict[str, Any]) -> dict[str, Any]:
    """The targets beside what was reached, for the first case."""
    reached = {
        "forward_over_sdpa": row["forward"]["gather"]["times_faster_than_sdpa"]["median"],
        "forward_backward_over_sdpa": row["forward_backward"]["gather"]["times_faster_than_sdpa"]["median"],
    }
    if "times_faster_than_flex" in row["forward"]["gather"]:
        reached["flex_over_gather"] = row["forward"]["gather"]["times_faster_than_flex"]["median"]
    return {
        name: {"target": TARGETS[name], "reached": value, "met": value >= TARGETS[name]}
        for name, value in reached.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="default: all")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-flex", action="store_true", help="leave compiled FlexAttention out")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every length, for trying the script out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gather_speed.json")
    args = parser.parse_args()
    reason = flex.unavailable()
    use_flex = not args.no_flex and reason is None
    load = load_average()
    peaks = machine_peaks()
    rows = {}
    for case in CASES:
        if args.cases and case.name not in args.cases:
            continue
        length = max(BLOCK, int(case.length * args.scale) // BLOCK * BLOCK)
        scaled = replace(case, length=length, window=case.window and max(1, case.window * length // case.length))
        rows[case.name] = row = measure_case(scaled, args.repeats, use_flex)
        forward = row["forward"]
        print(
            f"{case.name:32s} density {row['density']:.3f}  gather {forward['gather']['milliseconds']['median']:8.1f} ms, "
            f"{forward['gather']['times_faster_than_sdpa']['median']:5.2f}× SDPA"
            + (f", {forward['gather']['times_faster_than_flex']['median']:5.2f}× flex" if use_flex else "")
            + (
                f", with backward {row['forward_backward']['gather']['times_faster_than_sdpa']['median']:5.2f}×"
                if case.backward
                else ""
            ),
            flush=True,
        )
    result = {
        "what": "foveal's gather against torch's dense SDPA and compiled FlexAttention, medians of interleaved runs",
        "targets": verdict(rows["random_10"]) if "random_10" in rows else {},
        "peaks": peaks,
        "load_before": load,
        "repeats": args.repeats,
        "flex": "measured" if use_flex else reason or "left out",
        "cases": rows,
    }
    write_result(args.out, rounded(result))
    for name, target in result["targets"].items():
        print(f"{name}: {target['reached']:.2f}, target {target['target']:.2f}: {'met' if target['met'] else 'MISSED'}")


if __name__ == "__main__":
    main()
