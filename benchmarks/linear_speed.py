"""How fast linear attention and the Toeplitz product are, and how they grow with the length.

Usage: python benchmarks/linear_speed.py [--repeats 5] [--scale 1.0] [--cpu-time] [--out benchmarks/results/linear_speed.json]

- ``linear``: one head of 64, float32, 16k tokens, both directions and causal, beside torch's SDPA of the same kind: the form that is
  taken by default, in C++ (``native``) and in torch (``chunked``); the exponent is the slope of log time over log length from 4k to
  64k tokens. ``native_work`` counts the multiply-adds of the C++ form and sets their rate beside that of a bare loop of them.
- ``toeplitz``: the product with 32 columns, 2k to 32k rows, in float32 and float64.
- ``ragged``: sets in a flat array, 4 heads of 32, packed beside padded to the longest; padding in and out counts for the padded
  form, since the data are flat. ``even`` sets have all one size, ``skewed`` ones log-normal sizes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import interleaved, speedups
from foveal.kernels import native
from foveal.kernels.linear import linear_attention
from foveal.kernels.linear_ragged import linear_attention_packed
from foveal.kernels.toeplitz import toeplitz_matmul

CLOCK = time.perf_counter
SEED, DIM, LENGTH = 0, 64, 16384
CHUNK, STEP = 48, 12  # of src/native/linear.hpp
LINEAR_LENGTHS = (4096, 8192, 16384, 32768, 65536)
TOEPLITZ_LENGTHS, COLUMNS = (2048, 4096, 8192, 16384, 32768), 32
HEADS, WIDTH, SETS = 4, 32, 200
TARGETS = {
    "both directions over sdpa, at least": 40.0,
    "causal over causal sdpa, at least": 40.0,
    "both directions, growth exponent at most": 1.1,
    "causal, growth exponent at most": 1.1,
    "toeplitz float32, growth exponent at most": 1.2,
    "toeplitz float64, growth exponent at most": 1.2,
    "packed over padded, even sets of 16, at least": 1.0,
    "packed over padded, even sets of 21, at least": 1.0,
    "packed over padded, even sets of 256, at least": 1.0,
    "packed over padded, skewed sets, at least": 5.0,
    "packed over padded, skewed sets with backward, at least": 5.0,
}


def growth(seconds: dict[int, float]) -> float:
    """Slope of the least-squares line through (log n, log seconds)."""
    x, y = [math.log(n) for n in seconds], [math.log(s) for s in seconds.values()]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def summary(seconds: dict[str, list[float]], baseline: str) -> dict[str, Any]:
    fast = speedups(seconds, baseline)
    return {
        name: {"milliseconds": 1e3 * statistics.median(values), f"over_{baseline}": fast[name].json()}
        for name, values in seconds.items()
    }


def native_work(n: int, causal: bool, seconds: float) -> dict[str, float]:
    """Floating-point operations of the C++ form (two per multiply-add), their rate, and what a bare loop of them reaches."""
    from foveal.kernels.native import _native

    pairs = (CHUNK + STEP) / 2 if causal else 0  # keys of its own chunk that a row meets, on average
    operations = 2.0 * n * DIM * (2 * DIM + 2 * pairs)
    start = CLOCK()
    done = _native.peak(False, 20_000_000, torch.get_num_threads())
    limit = done / (CLOCK() - start)
    return {
        "gflop": operations / 1e9,
        "gflop_per_second": operations / seconds / 1e9,
        "limit_gflop_per_second": limit / 1e9,
        "share_of_limit": operations / seconds / limit,
    }


def linear(repeats: int, scale: float) -> dict[str, Any]:
    g = torch.Generator().manual_seed(SEED)

    def tensors(n: int) -> list[Tensor]:
        return [torch.rand(1, 1, n, DIM, generator=g) for _ in range(3)]

    n = int(LENGTH * scale)
    one, rows = tensors(n), {}
    for name, causal in (("both directions", False), ("causal", True)):
        pair = {
            "sdpa": partial(scaled_dot_product_attention, *one, is_causal=causal),
            "linear": partial(linear_attention, *one, causal=causal),
            "chunked": partial(linear_attention, *one, causal=causal, impl="chunked"),
        }
        has_native = native.unavailable() is None
        if has_native:
            pair["native"] = partial(linear_attention, *one, causal=causal, impl="native")
        lengths = [int(m * scale) for m in LINEAR_LENGTHS]
        jobs = {str(m): partial(linear_attention, *tensors(m), causal=causal) for m in lengths}
        found = interleaved(jobs, repeats, clock=CLOCK)
        beside = interleaved(pair, repeats, clock=CLOCK)
        rows[name] = {
            **summary(beside, "sdpa"),
            "native_work": native_work(n, causal, min(beside["native"])) if has_native else None,
            "growth_exponent": growth({m: min(found[str(m)]) for m in lengths}),
            "milliseconds_by_length": {m: 1e3 * min(values) for m, values in found.items()},
        }
    return {"length": n, "head_dim": DIM, **rows}


def toeplitz(repeats: int, scale: float) -> dict[str, Any]:
    g = torch.Generator().manual_seed(SEED)
    out: dict[str, Any] = {"columns": COLUMNS}
    for precision in ("float32", "float64"):
        jobs = {}
        for m in (int(m * scale) for m in TOEPLITZ_LENGTHS):
            c, a = torch.rand(1, 2 * m - 1, generator=g), torch.rand(1, m, COLUMNS, generator=g)
            jobs[str(m)] = partial(toeplitz_matmul, c, a, precision=precision)  # type: ignore[arg-type]
        found = {m: min(values) for m, values in interleaved(jobs, repeats, clock=CLOCK).items()}
        out[precision] = {
            "growth_exponent": growth({int(m): s for m, s in found.items()}),
            "milliseconds_by_length": {m: 1e3 * s for m, s in found.items()},
        }
    return out


def padded(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """Flat rows → padded to the longest set → linear attention → flat rows."""

    def pad(x: Tensor) -> Tensor:
        out = x.new_zeros(*valid.shape, *x.shape[1:])
        out[valid] = x
        return out.transpose(1, 2)

    out, _ = linear_attention(pad(q), pad(k), pad(v), valid=valid, eps=1e-6)
    return out.transpose(1, 2)[valid]


def ragged(repeats: int, scale: float) -> dict[str, Any]:
    g = torch.Generator().manual_seed(SEED)
    count = max(8, int(SETS * scale))
    sizes = {f"even sets of {n}": torch.full((count,), n) for n in (16, 21, 256)}
    sizes["skewed sets"] = torch.exp(1.8 + 1.5 * torch.randn(count, generator=g)).long() + 1
    rows = {}
    for name, size in sizes.items():
        cu = torch.cat([size.new_zeros(1), size.cumsum(0)])
        valid = torch.arange(int(size.max())) < size[:, None]
        q, k, v = (torch.rand(int(cu[-1]), HEADS, WIDTH, generator=g) for _ in range(3))
        pair: dict[str, Callable[..., Tensor]] = {
            "padded": lambda q, k, v, valid=valid: padded(q, k, v, valid),
            "packed": lambda q, k, v, cu=cu: linear_attention_packed(q, k, v, cu, eps=1e-6)[0],
        }
        torch.testing.assert_close(pair["packed"](q, k, v), pair["padded"](q, k, v))
        both = {job: with_gradients(run, (q, k, v)) for job, run in pair.items()}
        rows[name] = {
            "sets": count,
            "rows": int(cu[-1]),
            "padded_rows_over_rows": valid.numel() / int(cu[-1]),
            "forward": summary(
                interleaved({j: partial(run, q, k, v) for j, run in pair.items()}, repeats, clock=CLOCK), "padded"
            ),
            "forward_backward": summary(interleaved(both, repeats, clock=CLOCK), "padded"),
        }
    return rows


def with_gradients(run: Callable[..., Tensor], tensors: tuple[Tensor, ...]) -> Callable[[], Any]:
    def job() -> Any:
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every length, for trying the script out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "linear_speed.json")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread, and its processor time: for a busy machine"
    )
    args = parser.parse_args()
    if args.cpu_time:
        global CLOCK
        CLOCK = time.process_time
        torch.set_num_threads(1)
    load = load_average()
    with torch.no_grad():
        lines, products = linear(args.repeats, args.scale), toeplitz(args.repeats, args.scale)
    sets = ragged(args.repeats, args.scale)

    def over(row: dict[str, Any], name: str, baseline: str) -> float:
        found: float = row[name][f"over_{baseline}"]["median"]
        return found

    reached = {
        "both directions over sdpa, at least": over(lines["both directions"], "linear", "sdpa"),
        "causal over causal sdpa, at least": over(lines["causal"], "linear", "sdpa"),
        **{
            f"{kind}, growth exponent at most": lines[kind]["growth_exponent"] for kind in ("both directions", "causal")
        },
        **{
            f"toeplitz {kind}, growth exponent at most": products[kind]["growth_exponent"]
            for kind in ("float32", "float64")
        },
        **{
            f"packed over padded, {name}, at least": over(row["forward"], "packed", "padded")
            for name, row in sets.items()
        },
        "packed over padded, skewed sets with backward, at least": over(
            sets["skewed sets"]["forward_backward"], "packed", "padded"
        ),
    }
    targets = {
        name: {
            "target": t,
            "reached": reached[name],
            "met": reached[name] >= t if "least" in name else reached[name] <= t,
        }
        for name, t in TARGETS.items()
    }
    result = {
        "what": "linear attention beside SDPA, the Toeplitz product's growth, packed beside padded sets; interleaved runs",
        "targets": targets,
        "clock": CLOCK.__name__,
        "threads": torch.get_num_threads(),
        "load_before": load,
        "repeats": args.repeats,
        "linear": lines,
        "toeplitz": products,
        "ragged": sets,
    }
    write_result(args.out, rounded(result))
    for name, row in targets.items():
        print(f"{name} {row['target']}: {row['reached']:.3g} {'met' if row['met'] else 'MISSED'}")


if __name__ == "__main__":
    main()
