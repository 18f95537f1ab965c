"""How fast the C++ kernels are: against torch's SDPA, compiled FlexAttention, and what this machine can do at most.

Usage: python benchmarks/native_speed.py [--repeats 5] [--scale 1.0] [--no-flex] [--out benchmarks/results/native_speed.json]

8 heads of 64, batch 1, torch's number of threads. Every group of figures was measured in turns, with a bare loop of
multiply-adds among them, so that each figure stands beside the limit of the same minute. Operations are counted for visible
pairs only: ``4·D`` per pair forward, ``10·D`` backward. Decoding reads a cache of four times the last-level cache.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import foveal
from foveal.bench.peaks import machine_peaks
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread, interleaved
from foveal.core.base_mask import FULL
from foveal.core.layouts import BlockMask, Groups, KeySelection, Layout, block_mask
from foveal.kernels import flex
from foveal.kernels.native import _native

HEADS, DIM, DENSITY, SEED = 8, 64, 0.1, 0
CACHE_BYTES = 128 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TARGETS = {
    "forward_over_sdpa": {"float32": 2.3, "bfloat16": 4.0},
    "forward_share_of_peak": {"float32": 0.80, "bfloat16": 0.65},
    "backward_over_sdpa": {"float32": 1.5, "bfloat16": 2.5},
    "sparse_over_flex": {"float32": 2.0, "bfloat16": 3.0},
    "sparse_time_over_density": 1.2,
    "sparse_backward_time_over_density": 1.3,
    "decode_share_of_read": 0.8,
    "shortest_over_sdpa": 1.0,
}


@dataclass(frozen=True)
class Job:
    """Something to time and the work it does (operations, or bytes)."""

    run: Callable[[], Any]
    work: float


def tensors(length: int, dtype: torch.dtype, dim: int = DIM) -> list[Tensor]:
    make = torch.Generator().manual_seed(SEED)
    return [torch.randn(1, HEADS, length, dim, generator=make).to(dtype) for _ in range(3)]


def random_mask(length: int, block: int) -> BlockMask:
    tiles = -(-length // block)
    kept = torch.rand(1, HEADS, tiles, tiles, generator=torch.Generator().manual_seed(SEED)) < DENSITY
    return block_mask(kept.to(torch.int8) * FULL, (block, block), (length, length))


def share(mask: BlockMask) -> float:
    """Pairs that the mask keeps, over all."""
    assert mask.full_kv_num_blocks is not None
    tiles = -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])
    return float(mask.full_kv_num_blocks.double().mean()) / tiles


def peak_job(dtype: torch.dtype) -> Job:
    """A bare loop of multiply-adds on every thread: ``vdpbf16ps`` for bfloat16 where there is one, else float32."""
    pairs = dtype == torch.bfloat16 and _native.peak(True, 1, 1) > 0
    threads, rounds = torch.get_num_threads(), 1 << 19
    return Job(lambda: _native.peak(pairs, rounds, threads), _native.peak(pairs, rounds, threads))


def measure(jobs: dict[str, Job], repeats: int) -> dict[str, Any]:
    """Per job: milliseconds, GFLOP/s, its share of the peak, and how many times faster than SDPA it was, turn by turn."""
    seconds = interleaved({name: job.run for name, job in jobs.items()}, repeats)
    best = {name: jobs[name].work / min(values) for name, values in seconds.items()}
    out: dict[str, Any] = {}
    for name, values in seconds.items():
        row = out[name] = {"milliseconds": statistics.median(values) * 1e3, "best_gflops": best[name] / 1e9}
        if name != "peak":
            row["best_share_of_peak"] = best[name] / best["peak"]
        if name.startswith("native"):
            row["times_faster_than_sdpa"] = Spread.of(
                [a / b for a, b in zip(seconds["sdpa"], values, strict=True)]
            ).json()
            for other in ("flex", "gather"):
                if name != "native" and name.replace("native", other) in seconds:
                    theirs = seconds[name.replace("native", other)]
                    ratios = [a / b for a, b in zip(theirs, values, strict=True)]
                    row[f"times_faster_than_{other}"] = Spread.of(ratios).json()
            if "native" in seconds and name != "native":
                row["time_over_dense"] = Spread.of(
                    [b / a for a, b in zip(seconds["native"], values, strict=True)]
                ).json()
    return out


def forward(length: int, dtype: torch.dtype, dim: int, causal: bool, sparse: bool, use_flex: bool) -> dict[str, Job]:
    q, k, v = tensors(length, dtype, dim)
    pairs = HEADS * (length * (length + 1) / 2 if causal else length**2)
    jobs = {
        "peak": peak_job(dtype),
        "sdpa": Job(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), 4 * dim * pairs),
        "native": Job(lambda: foveal.attention(q, k, v, causal=causal, impl="native"), 4 * dim * pairs),
    }
    for block in (64, 128) if sparse else ():
        mask = random_mask(length, block)
        work = 4 * dim * pairs * share(mask)
        jobs[f"native_sparse_{block}"] = Job(lambda m=mask: foveal.attention(q, k, v, m, impl="native"), work)
        if use_flex:
            jobs[f"flex_sparse_{block}"] = Job(lambda m=mask: flex.compiled(q, k, v, block_mask=m), work)
    return jobs


def backward(length: int, dtype: torch.dtype) -> dict[str, Job]:
    q, k, v = (t.requires_grad_() for t in tensors(length, dtype))
    upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = random_mask(length, 128)
    pairs = HEADS * length**2
    outs = {
        "sdpa": (F.scaled_dot_product_attention(q, k, v), 1.0),
        "native": (foveal.attention(q, k, v, impl="native"), 1.0),
        "native_sparse_128": (foveal.attention(q, k, v, mask, impl="native"), share(mask)),
    }

    def job(out: Tensor, part: float) -> Job:
        return Job(lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True), 10 * DIM * pairs * part)

    return {"peak": peak_job(dtype), **{name: job(*value) for name, value in outs.items()}}


def listed(length: int, dtype: torch.dtype, grad: bool) -> dict[str, Job]:
    """A tenth of the keys for each 64 rows, packed documents, and groups that overlap; beside dense and beside ``gather``."""
    make = torch.Generator().manual_seed(SEED)
    q, k, v = (t.requires_grad_(grad) for t in tensors(length, dtype))
    upstream = torch.randn(q.shape, generator=make).to(dtype)
    blocks = length // 64
    routed = min(4, blocks)
    lists = torch.stack([torch.randperm(length, generator=make)[: int(DENSITY * length)] for _ in range(blocks)])
    cuts = torch.randperm(length - 1, generator=make)[:30].sort().values + 1
    bounds = torch.cat([torch.tensor([0]), cuts, torch.tensor([length])])
    chosen = torch.stack([torch.randperm(blocks, generator=make)[:routed] for _ in range(blocks)])
    rows = torch.arange(length).view(blocks, 1, 64).expand(-1, routed, -1).reshape(-1)
    keys = (chosen[..., None] * 64 + torch.arange(64)).reshape(-1)
    ends = torch.arange(0, rows.numel() + 1, 64)
    cases: dict[str, tuple[Layout | None, float]] = {
        "": (None, 1.0),
        "_lists_64": (KeySelection(lists[None, None], 64), int(DENSITY * length) / length),
        "_documents": (Groups.packed(bounds), float(bounds.diff().double().square().sum()) / length**2),
        "_groups": (Groups(rows, ends, keys, ends), routed / blocks),
    }

    def run(mask: Layout | None, impl: str) -> Tensor:
        out = foveal.attention(q, k, v, mask, impl=impl)
        return torch.autograd.grad(out, (q, k, v), upstream)[0] if grad else out

    def dense() -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        return torch.autograd.grad(out, (q, k, v), upstream)[0] if grad else out

    work = (14 if grad else 4) * DIM * HEADS * length**2
    jobs = {"peak": peak_job(dtype), "sdpa": Job(dense, work)}
    for name, (mask, part) in cases.items():
        for impl in ("native", "gather") if mask is not None else ("native",):
            jobs[impl + name] = Job(lambda m=mask, i=impl: run(m, i), work * part)
    return jobs


def decode(length: int, dtype: torch.dtype) -> dict[str, Job]:
    """One token over the whole cache; work is bytes, and the limit is a sum over as many bytes."""
    make = torch.Generator().manual_seed(SEED)
    q = torch.randn(1, 9, 1, DIM, generator=make).to(dtype)
    k, v = (torch.randn(1, 3, length, DIM, generator=make).to(dtype) for _ in range(2))
    size = 2.0 * k.numel() * k.element_size()
    plain = torch.ones(int(size) // 4)
    return {
        "peak": Job(plain.sum, size),
        "sdpa": Job(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), size),
        "native": Job(lambda: foveal.attention(q, k, v, causal=True, impl="native"), size),
    }


def verdict(rows: dict[str, Any]) -> dict[str, Any]:
    """Targets beside what was reached."""

    def middle(row: dict[str, Any], what: str) -> float:
        return row[what]["median"]

    found: list[tuple[str, float, float, bool]] = []
    for name in DTYPES:
        dense, back = rows[f"forward_{name}"], rows[f"backward_{name}"]
        native, sparse = dense["native"], [dense[f"native_sparse_{b}"] for b in (64, 128)]
        reached = {
            "forward_over_sdpa": middle(native, "times_faster_than_sdpa"),
            "forward_share_of_peak": native["best_share_of_peak"],
            "backward_over_sdpa": middle(back["native"], "times_faster_than_sdpa"),
        }
        if "times_faster_than_flex" in sparse[0]:
            reached["sparse_over_flex"] = min(middle(s, "times_faster_than_flex") for s in sparse)
        found += [(f"{what}_{name}", TARGETS[what][name], value, True) for what, value in reached.items()]  # type: ignore[index]
        over = max(middle(s, "time_over_dense") / d for s, d in zip(sparse, dense["densities"], strict=True))
        found.append((f"sparse_time_over_density_{name}", 1.2, over, False))
        over = middle(back["native_sparse_128"], "time_over_dense") / back["density"]
        found.append((f"sparse_backward_time_over_density_{name}", 1.3, over, False))
        found.append(
            (f"decode_share_of_read_{name}", 0.8, rows[f"decode_{name}"]["native"]["best_share_of_peak"], True)
        )
        shortest = min(
            middle(row["native"], "times_faster_than_sdpa")
            for key, row in rows.items()
            if key.startswith("length_") and name in key
        )
        found.append((f"shortest_over_sdpa_{name}", 1.0, shortest, True))
    return {
        name: {"target": target, "reached": value, "met": value >= target if above else value <= target}
        for name, target, value, above in found
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-flex", action="store_true", help="leave compiled FlexAttention out")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every length, for trying the script out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "native_speed.json")
    args = parser.parse_args()
    reason = flex.unavailable()
    use_flex = not args.no_flex and reason is None
    load = load_average()

    def scaled(length: int) -> int:
        return max(128, int(length * args.scale) // 128 * 128)

    rows: dict[str, Any] = {}

    def add(name: str, jobs: dict[str, Job], repeats: int, **facts: Any) -> None:
        rows[name] = {**measure(jobs, repeats), **facts}
        row = rows[name]["native"]
        print(
            f"{name:28s} {row['milliseconds']:9.2f} ms, {row['best_share_of_peak']:.0%} of the limit, "
            f"{row['times_faster_than_sdpa']['median']:.2f}× SDPA",
            flush=True,
        )

    long, half = scaled(8192), scaled(4096)
    for name, dtype in DTYPES.items():
        with torch.inference_mode():
            densities = [share(random_mask(long, block)) for block in (64, 128)]
            jobs = forward(long, dtype, DIM, False, True, use_flex)
            add(f"forward_{name}", jobs, args.repeats, length=long, densities=densities)
            add(f"causal_{name}", forward(half, dtype, DIM, True, False, False), args.repeats, length=half)
            add(f"dim128_{name}", forward(half, dtype, 128, False, False, False), args.repeats, length=half)
            for length in (256, 512, 1024, 2048):
                jobs = forward(scaled(length), dtype, DIM, False, False, False)
                add(f"length_{length}_{name}", jobs, 3 * args.repeats, length=scaled(length))
            keys = max(128, int(args.scale * CACHE_BYTES / (2 * 3 * DIM * dtype.itemsize)))
            add(f"decode_{name}", decode(keys, dtype), 3 * args.repeats, keys=keys)
            add(f"listed_{name}", listed(half, dtype, False), args.repeats, length=half)
        add(f"listed_trained_{name}", listed(half, dtype, True), args.repeats, length=half)
        add(f"backward_{name}", backward(half, dtype), args.repeats, length=half, density=share(random_mask(half, 128)))
    result = {
        "what": "foveal's C++ kernels against torch's SDPA and compiled FlexAttention, medians and best of interleaved runs",
        "instruction_set": _native.variant(),
        "threads": torch.get_num_threads(),
        "targets": verdict(rows),
        "torch_peaks": machine_peaks(),
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
