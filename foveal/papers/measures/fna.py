"""FNA's claims: naive, GEMM and fused forms of one operator against each other, and the memory of the fused one.

All forms run on the same inputs in turns; the fused form includes its token permutation and its layout. Shapes are those of the
card: 1-D 4096 window 256, 2-D 64×64 window 16×16, 3-D 8×16×16 window 4×8×8.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bench.memory import PeakMemory
from ...bench.timing import interleaved, speedups
from ...layers.neighborhood import neighborhood_attention
from .results import write_result

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "1-D": ((4096,), (256,)),
    "2-D": ((64, 64), (16, 16)),
    "3-D": ((8, 16, 16), (4, 8, 8)),
}
FORMS = ("naive", "gemm", "fused")
HEADS, DIM = 4, 64
FUSED_OVER_NAIVE = 2.0
MEMORY_RATIO = 1.2


def _tensors(shape: tuple[int, ...], device: str, dtype: torch.dtype, heads: int = HEADS) -> list[Tensor]:
    make = torch.Generator(device).manual_seed(0)
    return [torch.randn(1, *shape, heads, DIM, generator=make, device=device).to(dtype) for _ in range(3)]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1, -3).transpose(1, 2).contiguous()


def compare(
    device: str, dtype: torch.dtype, repeats: int, *, backward: bool = False, shapes: dict[str, Any] | None = None
) -> dict[str, dict[str, float]]:
    """Per shape: times faster than naive of every form and of dense SDPA, milliseconds of naive, and the error of the fused form."""
    rows = {}
    for name, (shape, window) in (shapes or SHAPES).items():
        q, k, v = (x.requires_grad_(backward) for x in _tensors(shape, device, dtype))
        jobs = {form: _job(_attend(q, k, v, window, form), [q, k, v], backward) for form in FORMS}
        flat = [_flat(x.detach()).requires_grad_(backward) for x in (q, k, v)]
        jobs["dense"] = _job(
            lambda flat=flat: torch.nn.functional.scaled_dot_product_attention(*flat),  # type: ignore[misc]
            flat,
            backward,
        )
        seconds = interleaved(jobs, repeats, device=device)
        fast = speedups(seconds, "naive")
        with torch.no_grad():
            outs = [neighborhood_attention(q, k, v, window, form=form) for form in ("fused", "naive")]  # type: ignore[arg-type]
        rows[name] = {form: float(f"{fast[form].median:.4g}") for form in (*FORMS, "dense")}
        rows[name]["naive_ms"] = float(f"{1e3 * statistics.median(seconds['naive']):.4g}")
        rows[name]["difference"] = float(f"{float((outs[0].float() - outs[1].float()).abs().max()):.3g}")  # type: ignore[union-attr]
    return rows


def _attend(q: Tensor, k: Tensor, v: Tensor, window: Any, form: Any) -> Callable[[], Any]:
    return lambda: neighborhood_attention(q, k, v, window, form=form)


def _job(run: Callable[[], Any], leaves: list[Tensor], backward: bool) -> Callable[[], Any]:
    if backward:
        return lambda: torch.autograd.grad(run().sum(), leaves)

    def forward() -> Any:
        with torch.no_grad():
            return run()

    return forward


def _text(rows: dict[str, dict[str, float]], *forms: str) -> str:
    return "; ".join(
        f"{name}: " + ", ".join(f"{form} {row[form]:.2f}×" for form in forms) for name, row in rows.items()
    )


def measure_gemm(*, out: Path | None = None, repeats: int = 3, shapes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Claim ``gemm-forward-fp16``, in float32 on CPU: is naive slower than GEMM, and GEMM not faster than fused?"""
    rows = compare("cpu", torch.float32, repeats, shapes=shapes)
    gemm = all(row["gemm"] > 1 for row in rows.values())
    ordered = gemm and all(row["fused"] >= row["gemm"] for row in rows.values())
    verdict = "reproduced" if ordered else "direction holds" if gemm else "not reproduced"
    numbers = {"ours": f"over naive, {_text(rows, 'gemm', 'fused')}", "rows": rows, "heads": HEADS, "head_dim": DIM}
    return write_result("fna", "gemm-forward-fp16", verdict, numbers, seed=0, out=out)


def measure_fused(*, out: Path | None = None, repeats: int = 3, shapes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Claim ``fused-fp32-forward`` on CPU; the error is measured against the masked dense reference in float64."""
    rows = compare("cpu", torch.float32, repeats, shapes=shapes)
    error = 0.0
    for shape, window in ((s, w) for s, w in (shapes or SHAPES).values()):
        q, k, v = _tensors(shape, "cpu", torch.float32, 1)
        fused = neighborhood_attention(q, k, v, window)
        exact = neighborhood_attention(q.double(), k.double(), v.double(), window, impl="reference", order="rows")
        assert isinstance(fused, Tensor) and isinstance(exact, Tensor)
        error = max(error, float((fused - exact).abs().max()))
    best = rows.get("2-D", next(iter(rows.values())))["fused"]
    verdict = "reproduced" if best >= FUSED_OVER_NAIVE and error <= 1e-5 else "direction holds" if best > 1 else "not reproduced"  # fmt: skip
    numbers = {
        "ours": f"over naive, {_text(rows, 'gemm', 'fused')}; error {error:.1e}",
        "criterion": FUSED_OVER_NAIVE,
        "error": float(f"{error:.3g}"),
        "rows": rows,
        "heads": HEADS,
        "head_dim": DIM,
    }
    return write_result("fna", "fused-fp32-forward", verdict, numbers, seed=0, out=out)


def measure_memory(*, out: Path | None = None, side: int = 96) -> dict[str, Any]:
    """Claim ``linear-memory``: peak memory that a forward pass adds, with a window and with one of four times its area."""
    peaks = {
        f"{form} {window}×{window}": _peak_alone(form, window, side) for form in ("fused", "gemm") for window in (8, 16)
    }
    ratio = peaks["fused 16×16"] / peaks["fused 8×8"]
    verdict = "reproduced" if ratio <= MEMORY_RATIO else "direction holds" if ratio < 2 else "not reproduced"
    numbers = {
        "ours": f"fused {ratio:.2f}×, with stored weights {peaks['gemm 16×16'] / peaks['gemm 8×8']:.2f}×",
        "criterion": MEMORY_RATIO,
        "peak_mb": peaks,
        "grid": [side, side],
    }
    return write_result("fna", "linear-memory", verdict, numbers, seed=0, out=out)


def _peak_alone(form: str, window: int, side: int) -> float:
    """MiB that one forward pass adds at its peak, in a process of its own, so that no earlier work has left memory behind."""
    module = "foveal.papers.measures.fna"
    command = [sys.executable, "-m", module, form, str(window), str(side)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def peak(form: Any, window: int, side: int) -> float:
    """The same in this process."""
    q, k, v = _tensors((side, side), "cpu", torch.float32)
    with torch.no_grad():
        neighborhood_attention(
            q[:, :16, :16], k[:, :16, :16], v[:, :16, :16], 2, form=form
        )  # loads what is loaded once
        with PeakMemory("cpu") as memory:
            neighborhood_attention(q, k, v, window, form=form)
    return memory.extra_mb


# --- on a CUDA device ----------------------------------------------------------------------------------------------


def measure_fused_gpu(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``fused-forward-fp16``, in bfloat16."""
    rows = compare("cuda", torch.bfloat16, 10)
    verdict = "reproduced" if rows["2-D"]["fused"] >= 5 else "direction holds" if rows["2-D"]["fused"] > 1 else "not reproduced"  # fmt: skip
    numbers = {"ours": f"over naive, {_text(rows, 'gemm', 'fused')}", "criterion": 5.0, "rows": rows}
    return write_result("fna", "fused-forward-fp16", verdict, numbers, seed=0, out=out)


def measure_backward_gpu(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``forward-backward-gain``, in bfloat16."""
    one, both = (compare("cuda", torch.bfloat16, 10, backward=backward) for backward in (False, True))
    gains = {name: (one[name]["fused"], both[name]["fused"]) for name in one}
    remains = all(b > 1 for _, b in gains.values())
    smaller = all(b < a for a, b in gains.values())
    verdict = "reproduced" if remains and smaller else "direction holds" if remains else "not reproduced"
    text = "; ".join(f"{name}: {a:.2f}× forward, {b:.2f}× with backward" for name, (a, b) in gains.items())
    return write_result("fna", "forward-backward-gain", verdict, {"ours": text, "forward": one, "both": both}, seed=0, out=out)  # fmt: skip


def measure_dense_gpu(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``not-slower-than-dense``, in bfloat16: windows up to a quarter of the grid."""
    shapes = {
        f"{rank} w={'×'.join(map(str, window))}": (shape, window)
        for rank, shape, windows in (
            ("1-D", (16384,), [(512,), (2048,), (4096,)]),
            ("2-D", (128, 128), [(16, 16), (32, 32), (64, 64)]),
            ("3-D", (16, 32, 32), [(4, 8, 8), (8, 16, 16), (8, 16, 32)]),
        )
        for window in windows
    }
    rows = {}
    for name, (shape, window) in shapes.items():
        q, k, v = _tensors(shape, "cuda", torch.bfloat16)
        flat = [_flat(x) for x in (q, k, v)]
        jobs = {
            "dense": _job(lambda f=flat: torch.nn.functional.scaled_dot_product_attention(*f), [], False),  # type: ignore[misc]
            "fused": _job(lambda a=(q, k, v), w=window: neighborhood_attention(*a, w), [], False),  # type: ignore[misc]
        }
        rows[name] = speedups(interleaved(jobs, 10, device="cuda"), "dense")["fused"].median
    share = sum(x >= 1 for x in rows.values()) / len(rows)
    verdict = "reproduced" if share >= 0.97 else "direction holds" if share >= 0.5 else "not reproduced"
    text = (
        f"{share:.0%} of {len(rows)} problems; dense wins at {', '.join(n for n, x in rows.items() if x < 1) or 'none'}"
    )
    return write_result("fna", "not-slower-than-dense", verdict, {"ours": text, "times_faster": rows}, seed=0, out=out)


if __name__ == "__main__":
    print(peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
