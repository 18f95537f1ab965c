"""How fast is the chunked selective scan: beside a plain sequential loop and transformers' path without CUDA kernels.

Usage: python benchmarks/selective_scan_speed.py [--cases NAME …] [--repeats 5] [--scale 1.0] [--out benchmarks/results/selective_scan_speed.json]

The loop is the definition in float32, one step after the other. transformers' path is ``mamba_selective_scan`` of its Mamba
model, called without extra packages: it makes ``exp(ΔA)`` and ``ΔBx`` of the whole sequence and then loops. All three see the
same float32 tensors; autograd through its slices costs O(L²), so its backward is left out of the longer cases.
``kept_megabytes`` counts what autograd holds between forward and backward, inputs included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import Spread, interleaved, speedups
from foveal.kernels.selective_scan import selective_scan

SEED = 0


@dataclass(frozen=True)
class Case:
    """``(batch, length, channels, states)``; ``their_backward`` is off where transformers' would take minutes."""

    name: str
    batch: int
    length: int
    channels: int
    states: int = 16
    their_backward: bool = True


CASES = [
    Case("mambattention_frequency_row", 1, 321, 256),  # one frequency row over two seconds
    Case("mambattention_time", 4, 321, 256),  # four rows at once
    Case("mamba_130m_1024", 1, 1024, 1536, their_backward=False),
    Case("narrow_4096", 1, 4096, 64, their_backward=False),
]


def loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The definition, in the inputs' own dtype."""
    h = x.new_zeros(x.shape[0], *A.shape)
    y = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        y.append((h * C[:, t, None, :]).sum(-1))
    return torch.stack(y, 1)


def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """transformers' scan, in its own layout."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    return mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT, use_mambapy=False, use_associative_scan=False).mT


def chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return selective_scan(x, dt, A, B, C)[0]


WAYS: dict[str, Callable[..., Tensor]] = {"loop": loop, "transformers": theirs, "chunked": chunked}


def tensors(case: Case) -> list[Tensor]:
    g = torch.Generator().manual_seed(SEED)
    shape = (case.batch, case.length)
    x, dt = (torch.randn(*shape, case.channels, generator=g) for _ in range(2))
    a = -torch.arange(1.0, case.states + 1).repeat(case.channels, 1)
    b, c = (torch.randn(*shape, case.states, generator=g) for _ in range(2))
    return [x, torch.nn.functional.softplus(dt - 3), a, b, c]


def measure_case(case: Case, repeats: int) -> dict[str, Any]:
    inputs = tensors(case)
    expected = selective_scan(*(t.double() for t in inputs), impl="reference")[0]
    kept, errors = {}, {}
    for name, way in WAYS.items():
        sizes: list[int] = []
        leaves = [t.clone().requires_grad_() for t in inputs]
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.nbytes) or t, lambda t: t):  # type: ignore[misc]
            errors[name] = float((way(*leaves).detach() - expected).abs().max())
        kept[name] = sum(sizes) / 2**20
    with torch.no_grad():
        forward = interleaved({name: lambda way=way: way(*inputs) for name, way in WAYS.items()}, repeats)  # type: ignore[misc]

    def both(way: Callable[..., Tensor]) -> Callable[[], Any]:
        def job() -> Any:
            leaves = [t.detach().requires_grad_() for t in inputs]
            return torch.autograd.grad(way(*leaves).sum(), leaves)

        return job

    ways = {name: way for name, way in WAYS.items() if case.their_backward or name != "transformers"}
    backward = interleaved({name: both(way) for name, way in ways.items()}, max(1, repeats // 2))
    return {
        "shape": {k: getattr(case, k) for k in ("batch", "length", "channels", "states")},
        "forward": _report(forward),
        "forward_backward": _report(backward),
        "kept_megabytes": kept,
        "largest_error": errors,
    }


def _report(seconds: dict[str, list[float]]) -> dict[str, Any]:
    times = {base: speedups(seconds, base) for base in ("loop", "transformers") if base in seconds}
    return {
        name: {
            "milliseconds": {k: v * 1e3 if k != "count" else v for k, v in Spread.of(values).json().items()},
            "times_faster_than": {base: times[base][name].json() for base in times},
        }
        for name, values in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[c.name for c in CASES], help="default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="factor of every length, for trying the script out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "selective_scan_speed.json")
    args = parser.parse_args()
    load, rows = load_average(), {}
    for case in CASES:
        if args.cases and case.name not in args.cases:
            continue
        scaled = replace(case, length=max(1, int(case.length * args.scale)))
        rows[case.name] = row = measure_case(scaled, args.repeats)
        shown = [
            f"{part} {row[part]['chunked']['times_faster_than'][base]['median']:.1f}× {base}"
            for part in ("forward", "forward_backward")
            for base in row[part]["chunked"]["times_faster_than"]
        ]
        print(f"{case.name:28s} {', '.join(shown)}; keeps {row['kept_megabytes']}", flush=True)
    result = {
        "what": "foveal's chunked selective scan against a sequential loop and transformers' scan, interleaved, float32",
        "load_before": load,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "cases": rows,
    }
    write_result(args.out, rounded(result))


if __name__ == "__main__":
    main()
