"""The fourteen masks of LongCA-bench on this machine: foveal's kernels beside torch's SDPA, forward and backward.

Usage: python benchmarks/masks.py [--scale 1.0] [--repeats 5] [--seconds 3] [--keep FOLDER] [--out benchmarks/results/masks.json]

4 query and 2 key heads of 64 in float32; forward at 4,096 and 8,192 tokens, backward at 4,096; rates count the visible pairs only.
The same as ``foveal bench --masks all --lengths 4k,8k --heads 4 --kv-heads 2`` and ``… --lengths 4k --backward``, in one file. With
``--keep`` an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from pathlib import Path
from typing import Any

import torch

from foveal.bench.masks import parse_masks
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.summary import Group, groups
from foveal.bench.sweep import Sweep, run_sweep
from foveal.bench.workload import BACKWARD, FORWARD, Heads

HEADS = Heads(4, 2, 64)
IMPLS = ("native", "gather", "sdpa")


def sweeps(scale: float, repeats: int, seconds: float) -> list[Sweep]:
    """Forward at both lengths, backward at the shorter one; windows and blocks shrink with ``scale``."""
    short, long = (max(256, int(n * scale) // 256 * 256) for n in (4096, 8192))
    small = {"window": max(16, int(1024 * scale)), "block": 128} if scale < 1 else None
    masks = tuple(parse_masks("all", small))
    common: dict[str, Any] = {"repeats": repeats, "seconds": seconds, "impls": IMPLS}
    return [
        Sweep(masks, (short, long), (HEADS,), directions=(FORWARD,), **common),
        Sweep(masks, (short,), (HEADS,), directions=(BACKWARD,), **common),
    ]


def row(group: Group) -> dict[str, Any]:
    """One case: every implementation's rate, memory and error, and how many times faster than SDPA ours is."""
    sdpa = group.entries["sdpa"].tflops
    found: dict[str, Any] = {}
    for name, entry in group.entries.items():
        if entry.tflops is None:
            found[name] = {"status": entry.status, "why": entry.why}
            continue
        found[name] = {
            "gflops": 1e3 * entry.tflops, "milliseconds": entry.milliseconds, "peak_mb": entry.peak_mb, "metadata_mb": entry.metadata_mb,
            "error": entry.error, "note": entry.note, "times_faster_than_sdpa": entry.tflops / sdpa if sdpa else None,
        }  # fmt: skip
    return {
        "mask": group.mask,
        "length": group.length,
        "direction": group.setting[4],
        "density": group.density,
        "implementations": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every length, for trying the script out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="a case takes fewer turns, three at least, rather than longer"
    )
    parser.add_argument("--keep", type=Path, default=None, help="folder for the lines measured so far")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "masks.json")
    args = parser.parse_args()
    load = load_average()
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        folder = args.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for sweep in sweeps(args.scale, args.repeats, args.seconds):
            records, absent = run_sweep(
                sweep, folder, lambda what, done, total: print(f"[{done}/{total}] {what}", flush=True)
            )
            for name, why in absent.items():
                print(f"{name}: {why}")
        rows = [row(group) for group in groups(records.rows)]
    result = {
        "what": "the masks of LongCA-bench: rates of visible pairs, medians of turns",
        "heads": HEADS.heads, "kv_heads": HEADS.kv_heads, "head_dim": HEADS.dim, "dtype": "float32", "seed": sweep.seed,
        "threads": torch.get_num_threads(), "load_before": load, "repeats": args.repeats, "seconds": args.seconds, "cases": rows,
    }  # fmt: skip
    write_result(args.out, rounded(result))
    for one in rows:
        native = one["implementations"].get("native", {}).get("times_faster_than_sdpa")
        told = "did not run" if native is None else f"native {native:.2f}× SDPA"
        print(f"{one['mask']:32s} {one['length']:6d} {one['direction']:9s} density {one['density'] or 0:.3f}: {told}")


if __name__ == "__main__":
    main()
