"""``foveal bench --ranks``: context parallelism over local ranks, or under torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def run_ranks(count: int, *, quick: bool, impl: str, timeout: float, seed: int, out: Path | None) -> None:
    """Check and measure context parallelism: errors, bytes, balance, memory, and a prediction for 96 GPUs.

    Exits with 1 where an error, a byte count or the balance of pairs is not what it must be.
    """
    from ..bench.rank_launch import launch, launched, take_part

    if not launched():
        words = [f"--ranks={count}", f"--impl={impl}", f"--timeout={timeout}", f"--seed={seed}"]
        words += ["--quick"] if quick else []
        words += [f"--out={out}"] if out else []
        code = launch(count, ["bench", *words], timeout)
        if code:
            raise typer.Exit(code)
        return
    from .progress import bar

    with bar() as report:
        result = take_part(quick=quick, impl=impl, timeout=timeout, seed=seed, out=out, report=report)
    if result is None:
        return
    from .guard import complain, output

    for table in tables(result):
        output().print(table)
    if result["mismatches"]:
        complain(f"not as it must be: {', '.join(result['mismatches'])}.")
        raise typer.Exit(1)


def tables(result: dict[str, Any]) -> list[Any]:
    """The result as tables for the terminal."""
    from rich.table import Table

    first = Table("method", "U × R (W)", "max error", "bytes fwd", "formula", "bytes bwd", "formula", "MiB per rank", title=f"{result['ranks']} ranks")  # fmt: skip
    for name, row in result["exact"].items():
        m = row["mesh"]
        peak = result["memory"].get(name)
        first.add_row(
            name, f"{m['ulysses']} × {m['ring']} ({m['windows']})", f"{row['error']:.1e}", f"{row['bytes_forward']:,}",
            f"{row['formula_forward']:,}", f"{row['bytes_backward']:,}", f"{row['formula_backward']:,}", f"{peak['peak_mib']:.1f}" if peak else "–",
        )  # fmt: skip
    second = Table("partition", "CPU s per rank", "max/mean", "pairs max/mean", title="causal ring")
    for name, row in result["balance"].items():
        second.add_row(
            name,
            " ".join(f"{s:.3f}" for s in row["cpu_s"]),
            f"{row['max_over_mean']:.3f}",
            f"{row['pairs_max_over_mean']:.3f}",
        )
    guess = result["prediction"]
    about = ", ".join(f"{key} {value:g}" for key, value in guess["parameters"].items())
    third = Table(
        "method",
        "U × R (W)",
        "full TFLOP/s per GPU",
        "causal",
        title=f"{guess['label']}: {about}",
        caption=guess["model"],
    )
    for name, row in guess["rows"].items():
        m = row.get("mesh", row)
        shape = f"{m['ulysses']} × {m['ring']} ({m['windows']})"
        rates = (
            [f"{row[mask]['tflops_per_gpu']:.0f}" for mask in ("full", "causal")]
            if "full" in row
            else [row["unsupported"], ""]
        )
        third.add_row(name, shape, *rates)
    return [first, second, third]
