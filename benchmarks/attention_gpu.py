"""The implementations against each other on a CUDA GPU: forward and backward, to 32k tokens.

Usage: python benchmarks/attention_gpu.py [--lengths 4096 8192 16384 32768] [--repeats 10] [--out benchmarks/results/attention_gpu.json]

Random blocks per head (causal, a tenth and a quarter of the blocks) in bfloat16 and float32: foveal's gather and flex, torch's
own compiled FlexAttention with the finished mask, and dense SDPA as the baseline. What cannot run is listed with its reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveal
from foveal.bench.memory import PeakMemory
from foveal.bench.peaks import machine_peaks
from foveal.bench.results import rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.core.base_mask import FULL, BaseMask
from foveal.core.density import measure
from foveal.core.layouts import BlockMask, block_mask, narrow
from foveal.kernels import flex

HEADS, KV_HEADS, DIM, BLOCK = 16, 4, 128, 128
Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def random_mask(length: int, density: float) -> BlockMask:
    """Random blocks per head under the diagonal; the diagonal and the first block always kept."""
    blocks = -(-length // BLOCK)
    kept = torch.rand(1, HEADS, blocks, blocks, generator=torch.Generator().manual_seed(0)) < density
    kept = (kept | torch.eye(blocks, dtype=torch.bool)).tril()
    kept[..., 0] = True
    return block_mask((kept.to(torch.int8) * FULL).cuda(), (BLOCK, BLOCK), (length, length))


def runs(mask: BlockMask, base: BaseMask) -> dict[str, Run]:
    joint = narrow(mask, base)
    return {
        "sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "gather": lambda q, k, v: foveal.attention(q, k, v, mask, causal=True, impl="gather"),
        "flex": lambda q, k, v: foveal.attention(q, k, v, mask, causal=True, impl="flex"),
        "torch_flex": lambda q, k, v: flex.compiled(q, k, v, block_mask=joint, enable_gqa=True),
    }


def job(run: Run, tensors: tuple[Tensor, ...], upstream: Tensor | None) -> Callable[[], Any]:
    if upstream is None:
        return lambda: run(*tensors)
    leaves = [t.detach().requires_grad_() for t in tensors]
    return lambda: torch.autograd.grad(run(*leaves), leaves, upstream)


def measure_length(length: int, density: float, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    make = torch.Generator("cuda").manual_seed(1)
    tensors = tuple(
        torch.randn(1, h, length, DIM, generator=make, device="cuda").to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS)
    )
    base = BaseMask.build(length, length, causal=True, device="cuda")
    mask = random_mask(length, density)
    kept = measure(mask, base, 1, HEADS, KV_HEADS)
    row: dict[str, Any] = {"density": kept.density, "tile_density": kept.tile_density, "cannot_run": {}}
    for name, upstream, per_pair in (
        ("forward", None, 4 * DIM),
        ("forward_backward", torch.randn_like(tensors[0]), 14 * DIM),
    ):
        ready: dict[str, Callable[[], Any]] = {}
        peak: dict[str, float] = {}
        for impl, run in runs(mask, base).items():
            try:
                ready[impl] = job(run, tensors, upstream)
                ready[impl]()
                with PeakMemory("cuda") as memory:
                    ready[impl]()
                peak[impl] = memory.extra_mb
            except Exception as error:  # the reason goes into the result; a benchmark compares what runs
                ready.pop(impl, None)
                row["cannot_run"][f"{name} {impl}"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        with torch.set_grad_enabled(upstream is not None):
            seconds = interleaved(ready, repeats, warmup=2, device="cuda")
        faster = speedups(seconds, "sdpa")
        row[name] = {
            impl: {
                "milliseconds": {k: v * 1e3 if k != "count" else v for k, v in Spread.of(values).json().items()},
                "times_faster_than_sdpa": faster[impl].json(),
                "exact_tflops": per_pair
                * (kept.allowed if impl == "sdpa" else kept.pairs)
                / Spread.of(values).median
                / 1e12,
                "peak_mb": peak[impl],
            }
            for impl, values in seconds.items()
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.1, 0.25])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention_gpu.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("attention_gpu.py needs a CUDA GPU, and torch sees none here; run it on a machine with one.")
    rows: dict[str, Any] = {}
    for length in args.lengths:
        for density in args.densities:
            for dtype in (torch.bfloat16, torch.float32):
                torch.compiler.reset()
                row = measure_length(length, density, dtype, args.repeats)
                rows[f"{length} {density} {str(dtype)[6:]}"] = row
                for name in ("forward", "forward_backward"):
                    cells = (
                        f"{impl} {c['times_faster_than_sdpa']['median']:.2f}× ({c['exact_tflops']:.0f} TFLOP/s)"
                        for impl, c in row[name].items()
                    )
                    print(f"{length:6d} {density:.2f} {str(dtype)[6:]:9s} {name:16s} {', '.join(cells)}", flush=True)
                for what, reason in row["cannot_run"].items():
                    print(f"       {what}: {reason}")
    result = {
        "what": "block-sparse attention on a CUDA GPU against dense SDPA, medians of interleaved runs",
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "block": BLOCK},
        "peaks": machine_peaks("cuda"),
        "cases": rows,
    }
    write_result(args.out, rounded(result))


if __name__ == "__main__":
    main()
