"""The picture of speed against loss: laid out once in pixels, drawn as SVG by the report and as PNG for the README."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ..core.errors import DataError, UnsupportedError
from .labels import FONT, Box, Label, Mark, clear_spot, place_labels, text_width
from .table import figure, finite, interval, ordered, percent

KINDS = {"chosen": "chosen", "allowed": "allowed", "slower than dense": "slower", "over the loss limit": "over"}
"""Verdict to the class of its mark."""


@dataclass(frozen=True)
class Plot:
    """A finished layout; all places in pixels.

    Attributes:
        frame: the plotting area. ticks: ``(place, text)``. one: x of speed-up 1. limit: y of the loss limit.
        frontier: corners of the staircase through the points that no other point beats in both.
        unlabelled: names without room for a label. undrawn: names without a finite figure.
    """

    width: float
    height: float
    frame: Box
    x_title: str
    y_title: Label
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    one: float
    limit: float
    limit_label: Label
    corner: Label
    marks: list[Mark]
    labels: list[Label]
    frontier: list[tuple[float, float]]
    bent: bool
    unlabelled: list[str]
    undrawn: list[str]
    alt: str


def pareto(
    results: Mapping[str, Any], what: Literal["prefill", "decode"] = "prefill", width: int = 960, height: int = 470
) -> Plot | None:
    """Lay out speed-up against perplexity increase; None when no candidate has both figures.

    Args:
        results: the dictionary of ``results.json``.
        what: prefill with the teacher-forced loss, or decoding with the loss of cached decoding.
        width, height: size in pixels.
    """
    prefix = "decode_" if what == "decode" else ""
    points, undrawn = [], []
    for candidate in ordered(results)[::-1]:  # best last, so that it is drawn on top
        speed, loss = finite(candidate.get(f"{what}_speedup")), finite(candidate.get(f"{prefix}ppl_increase"))
        if speed is None or loss is None or speed <= 0:
            undrawn.append(candidate["name"])
            continue
        bars = (
            interval(candidate.get(f"{what}_speedup_range")),
            interval(candidate.get(f"{prefix}ppl_increase_interval")),
        )
        points.append((speed, loss, bars, KINDS.get(candidate.get("verdict", ""), "other"), candidate["name"]))
    if not points:
        return None
    name = results["baseline"]["name"]
    points.append((1.0, 0.0, (None, None), "baseline", name))
    limit = max(finite(results.get("max_ppl_increase")) or 0.0, 1e-6)
    frame: Box = (0.0, 14.0, width - 14.0, height - 46.0)
    to_y, y_ticks, bent = _y_axis([p[1] for p in points] + [b for p in points for b in p[2][1] or ()], limit, frame)
    frame = (16 + max(0.9 * text_width(text) for _, text in y_ticks), *frame[1:])
    to_x, x_ticks = _x_axis([p[0] for p in points] + [b for p in points for b in p[2][0] or () if b > 0], frame)
    marks = [
        Mark(
            to_x(speed), to_y(loss), kind, name,
            f"{name}: {figure(speed, '.2f')}× {what}, perplexity {percent(loss)}",
            None if bars[0] is None or bars[0][0] <= 0 else (to_x(bars[0][0]), to_x(bars[0][1])),
            None if bars[1] is None else (to_y(bars[1][1]), to_y(bars[1][0])),
        )
        for speed, loss, bars, kind, name in points
    ]  # fmt: skip
    limit_text, limit_y = f"limit {figure(limit, '.3g', ' %', 100.0)}", to_y(limit) - 5
    ends = (frame[0] + 6, frame[2] - 6 - text_width(limit_text))
    limit_label = Label(limit_text, clear_spot(text_width(limit_text), limit_y, ends, marks), limit_y, "limit", None)
    corner = Label("better ↘", frame[2] - 8 - text_width("better ↘"), frame[3] - 8, "corner", None)
    y_title = Label(
        "perplexity increase" + (" while decoding" if what == "decode" else ""),
        frame[0] + 6,
        frame[1] + 14,
        "title",
        None,
    )
    steps = _frontier([(p[0], p[1]) for p in points], to_x, to_y)
    lines = [(*a, *b) for a, b in pairwise(steps)]
    lines += [(frame[0], to_y(limit), frame[2], to_y(limit)), (to_x(1.0), frame[1], to_x(1.0), frame[3])]
    taken = [limit_label, corner, y_title]
    labels, unlabelled = place_labels(marks, frame, taken, lines, 100.0 if width > 600 else 48.0)
    best = [m for m in marks if m.kind == "chosen"]
    alt = f"{what.capitalize()} speed-up against perplexity increase: {len(points) - 1} candidates and the baseline {name}"
    alt += f"; chosen is {best[0].tip}." if best else "."
    return Plot(
        width, height, frame, f"{what} speed-up over {name}", y_title, x_ticks, y_ticks, to_x(1.0), to_y(limit), limit_label, corner,
        marks, labels, steps, bent, unlabelled, undrawn, alt,
    )  # fmt: skip


def _x_axis(speeds: Iterable[float], frame: Box) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Logarithmic, because 2× and 0.5× are the same distance from 1×."""
    values = [math.log2(s) for s in speeds]
    low, high = min([*values, -0.15]), max([*values, 0.35])
    pad = 0.06 * (high - low)
    low, high = low - pad, high + pad

    def place(speed: float) -> float:
        return frame[0] + (math.log2(speed) - low) / (high - low) * (frame[2] - frame[0])

    powers = [2.0**k for k in range(math.ceil(low), math.floor(high) + 1)]
    halves = sorted({*powers, *(1.5 * p for p in [*powers, 2.0 ** (math.ceil(low) - 1)])})
    tenths = [k / 10 for k in range(1, 100)]
    for ladder in (powers, halves, tenths):
        inside = [t for t in ladder if low <= math.log2(t) <= high]
        if len(inside) >= 4:
            break
    return place, _spaced([(place(t), f"{t:.3g}×") for t in sorted(inside, key=lambda t: abs(math.log2(t)))], 44)


def _y_axis(
    losses: Iterable[float], limit: float, frame: Box
) -> tuple[Callable[[float], float], list[tuple[float, str]], bool]:
    """Linear while everything is near the limit; otherwise ``asinh(loss / limit)``: linear below it, logarithmic above."""
    values = [*losses, 0.0, 1.6 * limit]
    bent = max(values) > 6 * limit or min(values) < -6 * limit

    def scale(loss: float) -> float:
        return math.asinh(loss / limit) if bent else loss / limit

    low, high = scale(min(values)), scale(max(values))
    pad = 0.08 * (high - low)
    low, high = low - pad, high + pad

    def place(loss: float) -> float:
        return frame[3] - (scale(loss) - low) / (high - low) * (frame[3] - frame[1])

    decades = [m * 10.0**k for k in range(-6, 9) for m in (1, 2, 5)]
    if bent:
        near = [t for t in decades if t >= 0.2 * limit]
        ticks = [0.0, limit, *near, *(-t for t in near)]
    else:
        span = max(values) - min(values)
        step = next((t for t in decades if span / t <= 7), span)
        ticks = [step * k for k in range(-8, 9)]
    inside = [t for t in ticks if low <= scale(t) <= high]
    return place, _spaced([(place(t), _tick(t)) for t in inside], 26), bent


def _tick(loss: float) -> str:
    return "0" if loss == 0 else figure(loss, "+,.6g", " %", 100.0)


def _spaced(ticks: list[tuple[float, str]], gap: float) -> list[tuple[float, str]]:
    """Ticks in the given order of importance, without those closer than ``gap`` pixels to an earlier one."""
    kept: list[tuple[float, str]] = []
    for at, text in ticks:
        if all(abs(at - other) >= gap for other, _ in kept):
            kept.append((at, text))
    return sorted(kept)


def _frontier(
    points: Sequence[tuple[float, float]], to_x: Callable[[float], float], to_y: Callable[[float], float]
) -> list[tuple[float, float]]:
    """Staircase through the points that no other point beats in both speed and loss."""
    best: list[tuple[float, float]] = []
    for speed, loss in sorted(points, key=lambda p: (-p[0], p[1])):
        if not best or loss < best[-1][1]:
            best.append((speed, loss))
    corners: list[tuple[float, float]] = []
    for speed, loss in reversed(best):
        if corners:
            corners.append((corners[-1][0], to_y(loss)))
        corners.append((to_x(speed), to_y(loss)))
    return corners


_INK = {
    "chosen": "#0b7a6b", "allowed": "#0b7a6b", "slower": "#7b8794", "over": "#c2511b", "other": "#7b8794", "baseline": "#1d2730",
    "limit": "#c2511b", "corner": "#0b7a6b", "title": "#1d2730",
}  # fmt: skip


def pareto_png(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw prefill speed-up against perplexity increase into a PNG file, 1920 pixels wide.

    Raises:
        DataError: no candidate has both figures.
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patheffects import withStroke
    except ImportError as error:
        raise UnsupportedError("pictures need matplotlib: pip install 'foveal[report]'.") from error
    plot = pareto(results)
    if plot is None:
        raise DataError(
            "results has no candidate with a finite prefill_speedup and ppl_increase; there is nothing to draw."
        )
    canvas = Figure(figsize=(plot.width / 100, plot.height / 100), dpi=200, facecolor="white")
    FigureCanvasAgg(canvas)
    axes = canvas.add_axes((0, 0, 1, 1), xlim=(0, plot.width), ylim=(plot.height, 0))
    axes.axis("off")
    point = 72 / 100  # typographic points per pixel of the layout
    left, top, right, bottom = plot.frame
    halo = [withStroke(linewidth=2.5, foreground="white")]

    def line(xs: Sequence[float], ys: Sequence[float], color: str, width: float = 1.0, **style: Any) -> None:
        axes.plot(xs, ys, color=color, linewidth=width * point, **style)

    def text(label: Label, **style: Any) -> None:
        ink = "#52606d" if label.kind in ("over", "slower") else _INK.get(label.kind, "#52606d")
        bold = "bold" if label.kind == "chosen" else "normal"
        axes.text(
            label.x,
            label.y,
            label.text,
            fontsize=0.9 * FONT * point,
            color=ink,
            weight=bold,
            path_effects=halo,
            **style,
        )

    axes.fill_between([left, right], [plot.limit] * 2, [bottom] * 2, color="#0b7a6b", alpha=0.06, linewidth=0)
    for x, name in plot.x_ticks:
        line([x, x], [top, bottom], "#e6eaed")
        axes.text(x, bottom + 16, name, ha="center", fontsize=12 * point, color="#52606d")
    for y, name in plot.y_ticks:
        line([left, right], [y, y], "#e6eaed")
        axes.text(left - 7, y + 4, name, ha="right", fontsize=11 * point, color="#52606d")
    line([plot.one] * 2, [top, bottom], "#9aa5b1", 1.2)
    line([left, right], [plot.limit] * 2, "#c2511b", 1.2, linestyle=(0, (5, 4)))
    line([p[0] for p in plot.frontier], [p[1] for p in plot.frontier], "#0b7a6b", 1.4, alpha=0.5)
    axes.text(
        (left + right) / 2,
        plot.height - 8,
        f"{plot.x_title}, {results['model']}, {results['context']} tokens, {results['dtype']}",
        ha="center",
        fontsize=12.5 * point,
        color="#1d2730",
    )
    for label in (plot.y_title, plot.limit_label, plot.corner):
        text(label)
    for mark in plot.marks:
        ink = _INK[mark.kind]
        for xs, ys in ((mark.x_bar, (mark.y, mark.y)), ((mark.x, mark.x), mark.y_bar)):
            if xs is not None and ys is not None:
                line(xs, ys, ink, 1.2, alpha=0.45)
        hollow = mark.kind in ("slower", "over", "other")
        shape = {"over": "^", "baseline": "D", "slower": "s"}.get(mark.kind, "o")
        size = {"chosen": 11}.get(mark.kind, 9) * point
        if mark.kind == "chosen":
            axes.plot(
                [mark.x],
                [mark.y],
                "o",
                color=ink,
                markersize=20 * point,
                markerfacecolor="none",
                markeredgewidth=1.8 * point,
            )
        axes.plot(
            [mark.x], [mark.y], shape, color=ink, markersize=size, markerfacecolor="white" if hollow else ink, markeredgewidth=1.6 * point,
        )  # fmt: skip
    for label in plot.labels:
        if label.leader is not None:
            line(label.leader[0::2], label.leader[1::2], "#9aa5b1", 0.8)
        text(label)
    canvas.savefig(path)
