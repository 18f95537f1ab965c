"""How much faster the chunk form of the neural-memory scan is than its sequential rule, in turns, in one run.

Usage: python benchmarks/memory_scan_speed.py [--repeats 5] [--threads 1] [--out benchmarks/results/memory_scan_speed.json]

Both compute the same outputs and states; the sequential rule uses the same closed-form gradients, so only the order of the work differs.
The first case carries the target: a two-layer memory, four heads of 64 channels, chunks of 64, forward.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.kernels.memory_scan import MemoryState, memory_scan

TARGET, SEED = 10.0, 0


@dataclass(frozen=True)
class Case:
    """One shape: ``hidden`` 0 is a linear memory."""

    name: str
    length: int
    heads: int
    dim: int
    hidden: int
    chunk: int
    backward: bool = False

    def tensors(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        g = torch.Generator().manual_seed(SEED)
        shape = (1, self.heads, self.length)
        q, k, v = (torch.nn.functional.normalize(torch.randn(*shape, self.dim, generator=g), dim=-1) for _ in range(3))
        alpha, eta, theta = (scale * torch.rand(shape, generator=g) for scale in (0.1, 0.9, 0.2))
        sizes = [(self.dim, self.dim)] if not self.hidden else [(self.hidden, self.dim), (self.dim, self.hidden)]
        weights = tuple(torch.randn(1, self.heads, o, i, generator=g) / i**0.5 for o, i in sizes)
        return [q, k, v, alpha, eta, theta], weights


CASES = (
    Case("two layers, chunk 64", 1024, 4, 64, 256, 64),
    Case("two layers, chunk 64, forward and backward", 512, 4, 64, 256, 64, True),
    Case("two layers, chunk 16", 1024, 4, 64, 256, 16),
    Case("linear, chunk 64", 1024, 4, 64, 0, 64),
    Case("linear, chunk 64, forward and backward", 512, 4, 64, 0, 64, True),
)


def run(case: Case, tokens: list[Tensor], weights: tuple[Tensor, ...], impl: str) -> None:
    if not case.backward:
        with torch.inference_mode():
            memory_scan(*tokens, MemoryState.start(weights, case.chunk), impl=impl)
        return
    leaves = [t.detach().requires_grad_() for t in (*tokens, *weights)]
    out = memory_scan(*leaves[:6], MemoryState.start(tuple(leaves[6:]), case.chunk), impl=impl).out
    out.sum().backward()  # type: ignore[no-untyped-call]


def measure(case: Case, repeats: int) -> dict[str, Any]:
    tokens, weights = case.tensors()
    jobs: dict[str, Callable[[], None]] = {
        impl: partial(run, case, tokens, weights, impl) for impl in ("sequential", "chunked")
    }
    seconds = interleaved(jobs, repeats)
    ratio = speedups(seconds, "sequential")["chunked"]
    return {
        "length": case.length, "heads": case.heads, "dim": case.dim, "hidden": case.hidden, "chunk": case.chunk,
        "backward": case.backward, "speedup": ratio.json(),
        "seconds": {name: Spread.of(values).json() for name, values in seconds.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/memory_scan_speed.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for case in CASES:
        results[case.name] = measure(case, args.repeats)
        print(f"{case.name}: {results[case.name]['speedup']['median']:.1f} × the sequential rule", flush=True)
    first = results[CASES[0].name]["speedup"]["median"]
    result = {"cases": rounded(results), "target": {"speedup": TARGET, "met": first >= TARGET}, "threads": args.threads}
    write_result(args.out, {**result, "load_average": load_average(), "repeats": args.repeats})


if __name__ == "__main__":
    main()
