"""How much memory one layer of ``gather`` adds, beside the size of q + k + v.

Usage: python benchmarks/gather_memory.py [--length 16384] [--heads 8] [--out benchmarks/results/gather_memory.json]

Every case runs alone in a fresh process after a warm-up on a short input; the peak is the kernel's high-water mark of
resident memory above its level before the call, outputs and gradients included. Target: below ten times q + k + v.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import foveal
from foveal.bench.memory import MIB, PeakMemory
from foveal.bench.results import rounded, write_result
from foveal.core.base_mask import FULL
from foveal.core.layouts import Groups, KeySelection, Layout, block_mask
from foveal.patterns import SlidingWindow

BLOCK, DIM, TARGET = 128, 64, 10.0
CASES = ("random_blocks_10", "dense_causal", "sliding_window_1024", "key_selection_1024", "groups_512")


def call_of(case: str, length: int, heads: int) -> tuple[Layout | SlidingWindow | None, bool]:
    """The mask of a case, and whether it runs causally."""
    make = torch.Generator().manual_seed(0)
    if case == "random_blocks_10":
        blocks = -(-length // BLOCK)
        kept = torch.rand(1, heads, blocks, blocks, generator=make) < 0.1
        return block_mask(kept.to(torch.int8) * FULL, (BLOCK, BLOCK), (length, length)), False
    if case == "dense_causal":
        return None, True
    if case == "sliding_window_1024":
        return SlidingWindow(1024, sinks=4), True
    if case == "key_selection_1024":  # per head, one list for each 64 rows
        lists, width = -(-length // 64), min(1024, length)
        index = (
            torch.rand(heads, lists, length, generator=make).topk(width, dim=-1).indices
            if length <= 2048
            else _lists(make, heads, lists, length, width)
        )
        return KeySelection(index[None], 64), True
    size = min(512, length)  # every query in two groups of `size` keys: its neighbours, and a random set
    near = torch.arange(length).view(-1, size) if length % size == 0 else torch.arange(length)[None]
    mixed = torch.randperm(length, generator=make).view(near.shape)
    index, bounds = torch.cat([near, mixed]).reshape(-1), torch.arange(2 * near.shape[0] + 1) * near.shape[1]
    return Groups(index, bounds, index, bounds), True


def _lists(make: torch.Generator, heads: int, lists: int, length: int, width: int) -> Tensor:
    """Unique positions without a random number per pair: a random start and a stride coprime to the length."""
    start = torch.randint(length, (heads, lists, 1), generator=make)
    stride = 2 * torch.randint(length // 2, (heads, lists, 1), generator=make) + 1
    if length & (length - 1):
        stride = torch.ones_like(stride)
    return (start + stride * torch.arange(width)) % length


def attend(case: str, length: int, heads: int, dtype: torch.dtype, backward: bool) -> dict[str, Any]:
    """One measurement in this process."""
    mask, causal = call_of(case, length, heads)
    make = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, length, DIM, generator=make).to(dtype).requires_grad_(backward) for _ in range(3))
    size = 3 * q.numel() * q.element_size() / MIB
    with PeakMemory() as peak:
        out = foveal.attention(q, k, v, mask, causal=causal, impl="gather")
        if backward:
            out.sum().backward()
    return {"added_mb": peak.extra_mb, "q_k_v_mb": size, "times_q_k_v": peak.extra_mb / size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gather_memory.json")
    parser.add_argument("--child", nargs=3, metavar=("CASE", "DTYPE", "BACKWARD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        case, dtype, backward = args.child[0], getattr(torch, args.child[1]), args.child[2] == "yes"
        attend(case, 256, args.heads, dtype, backward)
        print(json.dumps(attend(case, args.length, args.heads, dtype, backward)))
        return
    rows: dict[str, Any] = {}
    for case in args.cases:
        for dtype in ("float32", "bfloat16"):
            for backward in ("no", "yes"):
                command = [
                    sys.executable,
                    __file__,
                    "--length",
                    str(args.length),
                    "--heads",
                    str(args.heads),
                    "--child",
                    case,
                    dtype,
                    backward,
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{case} {dtype} backward={backward} failed:\n{done.stderr}")
                row = json.loads(done.stdout)
                name = "forward_backward" if backward == "yes" else "forward"
                rows.setdefault(case, {}).setdefault(dtype, {})[name] = row
                print(
                    f"{case:20s} {dtype:9s} {name:16s} {row['added_mb']:7.0f} MiB, {row['times_q_k_v']:5.2f}× q+k+v",
                    flush=True,
                )
    worst = max(row["times_q_k_v"] for by_type in rows.values() for parts in by_type.values() for row in parts.values())
    scores = args.heads * args.length**2 * 4 / MIB
    result = {
        "what": "peak memory that one layer of gather adds, beside the size of q + k + v",
        "shape": {"length": args.length, "heads": args.heads, "head_dim": DIM},
        "full_scores_mb": scores,
        "targets": {"times_q_k_v": {"target": TARGET, "reached": worst, "met": worst < TARGET}},
        "cases": rows,
    }
    write_result(args.out, rounded(result))
    print(f"worst: {worst:.2f}× q+k+v, target below {TARGET:.0f}: {'met' if worst < TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
