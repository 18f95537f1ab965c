"""Pictures of the Kinetics cost model: cost against generated tokens, and accuracy against cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..policies.kinetics import Method, ModelShape, decode_cost


def draw_costs(
    shape: ModelShape, methods: Sequence[Method], path: Path | str, *, prompt: int, output: int, trials: int, **device: Any
) -> None:  # fmt: skip
    """Write total eFLOPs against generated tokens, up to ``output``, one line per method, as PNG."""
    from matplotlib.figure import Figure

    lengths = sorted({max(1, round(output ** (i / 63))) for i in range(64)})
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.add_subplot()
    for method in methods:
        totals = [decode_cost(shape, method, prompt=prompt, output=n, trials=trials, **device).total for n in lengths]
        ax.loglog(lengths, totals, label=str(method), lw=2 if method.kind == "dense" else 1)
    ax.set_xlabel("generated tokens")
    ax.set_ylabel("eFLOPs")
    ax.set_title(f"{shape.name}, prompt {prompt}, {trials} trial{'s' if trials > 1 else ''}", fontsize=10)
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def draw_frontiers(limits: Sequence[float], curves: Mapping[str, Sequence[float]], path: Path | str) -> None:
    """Write accuracy against the cost limit, one line per curve, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.add_subplot()
    for name, accuracy in curves.items():
        ax.semilogx(limits, accuracy, label=name)
    ax.set_xlabel("eFLOPs per question, at most")
    ax.set_ylabel("accuracy")
    ax.legend(fontsize=7)
    figure.savefig(path, dpi=150)
