"""Circuits for the eye: heat maps with matplotlib, and HTML fragments that stand alone in a report."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ..core.errors import UnsupportedError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .circuits import Circuit, Found, Stage
    from .row_edit import Sweep


def plot(circuit: Circuit) -> Figure:
    """One heat map of layer × head per stage; rings mark the heads that were kept.

    Returns:
        A matplotlib ``Figure`` of its own, outside pyplot's state.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("plots need matplotlib: pip install 'foveal[report]'.") from error
    figure = Figure(figsize=(4.2 * len(circuit.stages), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, found in zip(figure.subplots(1, len(circuit.stages), squeeze=False)[0], circuit.stages, strict=True):
        effect = found.effects.effect
        limit = float(effect.abs().nan_to_num(0).max()) or 1.0
        image = axes.imshow(
            effect.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        axes.scatter(
            [h for _, h in found.heads],
            [layer for layer, _ in found.heads],
            s=40,
            facecolors="none",
            edgecolors="black",
        )
        axes.set(title=f"{found.stage.name}: paths to {paths_to(found.stage)}", xlabel="head", ylabel="layer")
        figure.colorbar(image, ax=axes)
    figure.suptitle(f"{circuit.task}: effect of each head (1 = the whole corruption)")
    return figure


def html(circuit: Circuit) -> str:
    """``<section>`` with one small map per stage; hover tells head, effect and interval. No script, no outside file."""
    maps = "".join(_map(found) for found in circuit.stages)
    kept = ", ".join(f"{a}.{b}" for a, b in sorted(circuit.heads)) or "none"
    return (
        f'<section class="circuit"><h3>Circuit of {escape(circuit.task)}</h3>'
        f"<p>Accuracy {circuit.accuracy:.1%} (chance {1 / circuit.choices:.1%}); heads: {kept}.</p>"
        f'<div style="display:flex;flex-wrap:wrap;gap:1.5em">{maps}</div></section>'
    )


def paths_to(stage: Stage) -> str:
    """Where a stage's paths lead, in words."""
    return "the final residual" if stage.kind == "final" else f"{stage.kind} of {stage.of} at {stage.at}"


def _map(found: Found) -> str:
    effect = found.effects.effect
    low, high = found.effects.interval()
    limit = float(effect.abs().nan_to_num(0).max()) or 1.0
    kept = set(found.heads)
    rows = []
    for layer in range(effect.shape[0]):
        cells = []
        for head in range(effect.shape[1]):
            value = float(effect[layer, head])
            if value != value:
                cells.append("<td width=10></td>")
                continue
            color = "178,24,43" if value > 0 else "33,102,172"
            ring = "outline:1px solid #000;" if (layer, head) in kept else ""
            told = (
                f"head {layer}.{head}: {value:+.4f} [{float(low[layer, head]):+.4f}, {float(high[layer, head]):+.4f}]"
            )
            cells.append(
                f'<td width=10 height=10 title="{told}" style="{ring}background:rgba({color},{min(1.0, abs(value) / limit):.2f})"></td>'
            )
        rows.append(f'<tr><th style="font-size:8px;font-weight:400">{layer}</th>{"".join(cells)}</tr>')
    return (
        f"<figure style='margin:0'><figcaption>{escape(found.stage.name)}: paths to {escape(paths_to(found.stage))}</figcaption>"
        f'<table style="border-spacing:1px">{"".join(rows)}</table></figure>'
    )


def sweep_html(result: Sweep) -> str:
    """``<table>`` of accuracies under edits and controls."""
    rows = []
    for name, row in result.rows.items():
        span = (
            f"{row['low']:.1%} … {row['high']:.1%}"
            if "low" in row
            else f"± {row['spread']:.1%}, {row['draws']:.0f} draws"
        )
        errors = f"{row['new_errors']:.1%}" if "new_errors" in row else ""
        rows.append(f"<tr><td>{escape(name)}</td><td>{row['accuracy']:.1%}</td><td>{span}</td><td>{errors}</td></tr>")
    head = "<tr><th>edit</th><th>accuracy</th><th>95 %</th><th>new errors</th></tr>"
    return f'<table class="sweep">{head}{"".join(rows)}</table>'
