"""Pictures of the benchmark of kernels: throughput against length, one panel for each mask; as SVG inside a page."""

from __future__ import annotations

import io
import math
import re
from typing import Any

from ..core.errors import UnsupportedError
from .summary import Group, Setting, Unit, implementations_of

COLOURS = {
    "native": "#0b6e5f", "gather": "#8a5a00", "sdpa": "#1f4e8c", "sdpa-math": "#555f6b", "sdpa-flash": "#3a63c2", "sdpa-efficient": "#6b3fa0",
    "sdpa-cudnn": "#a3355c", "flex": "#b3390f", "flash-attn": "#7a1f1f", "natten": "#406b1f", "flashinfer": "#0f5f7d",
}  # fmt: skip
"""Of implementations; dark enough for white text."""

_MARKS = "osD^vP*X<>d"
_OTHER = "#44505c"


def colour(impl: str) -> str:
    return COLOURS.get(impl, _OTHER)


def throughput_svg(found: list[Group], setting: Setting, unit: Unit) -> str:
    """Rate against length of one setting, both axes logarithmic, a panel for each mask; an ``<svg>`` element.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError as error:
        raise UnsupportedError("pictures need matplotlib: pip install 'foveal[report]'.") from error
    own = [g for g in found if g.setting == setting]
    masks = list(dict.fromkeys(g.mask for g in own))
    names = implementations_of(own)
    columns = min(4, len(masks))
    lines = math.ceil(len(masks) / columns)
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": str(setting), "font.size": 9, "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(2.9 * columns + 0.4, 2.25 * lines + 0.7), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
        for ax in axes.flat[len(masks) :]:
            ax.set_visible(False)
        for ax in axes.flat[max(0, len(masks) - columns) : len(masks)]:
            ax.tick_params(labelbottom=True)
        handles = {}
        for ax, mask in zip(axes.flat, masks, strict=False):
            for name in names:
                points = sorted(
                    (g.length, *(unit.factor * (rate or e.tflops) for rate in (e.tflops, e.low, e.high)))
                    for g in own
                    if g.mask == mask and (e := g.entries.get(name)) is not None and e.tflops is not None
                )
                if not points:
                    continue
                x, y, low, high = zip(*points, strict=True)
                mark = _MARKS[names.index(name) % len(_MARKS)]
                (handles[name],) = ax.plot(x, y, color=colour(name), marker=mark, ms=4, lw=1.4)
                ax.fill_between(x, low, high, color=colour(name), alpha=0.15, lw=0)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.set_title(mask, fontsize=9)
            ax.grid(alpha=0.25, lw=0.6)
            ax.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
            ticks = sorted({g.length for g in own})
            ax.set_xticks(ticks if len(ticks) <= 6 else ticks[:: math.ceil(len(ticks) / 6)])
        figure.supxlabel("tokens", fontsize=9)
        figure.supylabel(unit.name, fontsize=9)
        figure.legend(
            list(handles.values()), list(handles), loc="outside upper center", ncols=6, frameon=False, fontsize=9
        )
        held = io.StringIO()
        figure.savefig(held, format="svg", metadata={"Date": None, "Creator": None})
    text = held.getvalue()
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="rate against length">', text[text.index("<svg") :], count=1)  # fmt: skip
