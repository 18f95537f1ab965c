"""One decode step: attention over chosen keys of a long cache, against torch's dense SDPA over the whole cache.

Usage: python benchmarks/decode.py [--length 8192] [--keys 1024] [--repeats 200] [--out benchmarks/results/decode.json]

9 query heads on 3 key heads of 64, batch 1, as SmolLM2 has them. Lists are shared by all heads, by the query heads of a key
head, or own to each query head. ``overhead`` is the same call with 4 keys of 64: what a call costs apart from its work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.core.base_mask import BaseMask
from foveal.core.layouts import KeySelection
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute

HEADS, KV_HEADS, DIM = 9, 3, 64
OVERHEAD_TARGET_US = 150.0


def jobs(length: int, keys: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    make = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, 1, DIM, generator=make).to(dtype)
    k, v = (torch.randn(1, KV_HEADS, length, DIM, generator=make).to(dtype) for _ in range(2))
    base = BaseMask.build(1, length, causal=True)
    out: dict[str, Callable[[], Any]] = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)}
    for name, lists in (("shared", 1), ("per_kv_head", KV_HEADS), ("per_head", HEADS)):
        index = torch.stack([torch.randperm(length, generator=make)[:keys].sort().values for _ in range(lists)])
        call = AttentionCall(q, k, v, KeySelection(index[None, :, None], 1), base, DIM**-0.5, return_lse=False)
        out[name] = lambda call=call: compute(call, "gather")
    return out


def table(length: int, keys: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    with torch.inference_mode():
        seconds = interleaved(jobs(length, keys, dtype), repeats, warmup=5)
    faster = speedups(seconds, "sdpa")
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    return {
        name: {
            "microseconds": {k: v * 1e6 if k != "count" else v for k, v in spread.json().items()},
            "times_faster_than_sdpa": faster[name].json(),
        }
        for name, spread in spreads.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--keys", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    args = parser.parse_args()
    load = load_average()
    rows = {
        str(dtype)[6:]: table(args.length, args.keys, dtype, args.repeats) for dtype in (torch.float32, torch.bfloat16)
    }
    overhead = table(64, 4, torch.float32, args.repeats)
    for dtype, row in rows.items():
        for name, cell in row.items():
            print(
                f"{dtype:9s} {name:12s} {cell['microseconds']['median']:8.0f} µs, {cell['times_faster_than_sdpa']['median']:5.2f}× SDPA"
            )
    worst = max(cell["microseconds"]["median"] for name, cell in overhead.items() if name != "sdpa")
    print(f"overhead of a call: {worst:.0f} µs, target at most {OVERHEAD_TARGET_US:.0f}")
    result = {
        "what": "one decode step over chosen keys against dense SDPA over the whole cache, medians of interleaved runs",
        "shape": {"length": args.length, "keys": args.keys, "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM},
        "targets": {
            "overhead_us": {"target": OVERHEAD_TARGET_US, "reached": worst, "met": worst <= OVERHEAD_TARGET_US}
        },
        "load_before": load,
        "decode": rows,
        "overhead": overhead,
    }
    write_result(args.out, rounded(result))


if __name__ == "__main__":
    main()
