"""Curves over positions as SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from ..core.errors import UnsupportedError

COLOURS = {"#010203": "var(--soft)", "#010204": "var(--line)", "#010205": "var(--ink)", "#010206": "var(--good)", "#010207": "var(--bad)", "#010208": "var(--faint)"}  # fmt: skip
"""Stand-ins that matplotlib draws with, and what the page puts in their place."""
_TEXT, _GRID, *_LINES = COLOURS
_STYLES = ("-", "--", ":", "-.")


def curves(task: Mapping[str, Any], context: int) -> str:
    """An ``<svg>`` of a task that scores positions: one line for each arm, means of bins over the position.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError("reports need matplotlib: pip install 'foveal[report]'.") from error
    look: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "foveal", "font.size": 10, "text.color": _TEXT, "axes.labelcolor": _TEXT, "axes.edgecolor": _GRID,
        "xtick.color": _TEXT, "ytick.color": _TEXT, "grid.color": _GRID, "legend.frameon": False,
    }  # fmt: skip
    with rc_context(look):
        picture = Figure(figsize=(9, 3.4), layout="constrained")
        axes = picture.subplots()
        for i, (name, arm) in enumerate(task["arms"].items()):
            x = [(row["from"] + row["to"]) / 2 for row in arm["curve"]]
            y = [row["mean"] for row in arm["curve"]]
            axes.plot(x, y, label=name.replace("$", r"\$"), color=_LINES[i % len(_LINES)], linestyle=_STYLES[i // len(_LINES) % len(_STYLES)], marker="o", markersize=3.5)  # fmt: skip
        axes.set_xlim(0, context)
        axes.set_xlabel("position, tokens")
        axes.set_ylabel("perplexity" if task["measure"] == "nll" else "KL to dense, nats")
        axes.grid(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
        file = io.StringIO()
        picture.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for stand_in, colour in COLOURS.items():
        svg = svg.replace(stand_in, colour)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    return svg.replace("<svg", '<svg class="curve" role="img" aria-label="' + _alt(task) + '"', 1)


def _alt(task: Mapping[str, Any]) -> str:
    """What the picture shows, for those who do not see it."""
    parts = []
    for name, arm in task["arms"].items():
        first, last = arm["curve"][0]["mean"], arm["curve"][-1]["mean"]
        parts.append(f"{name} from {first:.4g} to {last:.4g}")
    from html import escape

    return escape(f"{task['title']}: {'; '.join(parts)}.", quote=True)
