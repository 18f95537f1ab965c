"""The printed table of ``foveal eval``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..tune.table import figure, percent, small
from .report import shown

if TYPE_CHECKING:
    from rich.table import Table


def table(results: Mapping[str, Any]) -> Table:
    """One row for each task and arm; shares in per cent, margins in nats, 95 % intervals of choice and margin in brackets."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = Table(
        title=Text(f"{results['model']} at {results['context']} tokens, {results['dtype']}", style="bold"), title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    out.add_column("task", no_wrap=True)
    out.add_column("attention", overflow="fold", min_width=12)
    for name in ("exact %", "tokens %", "choice %", "margin, nats", "ppl or KL", "change"):
        out.add_column(name, justify="right", no_wrap=True)
    for name, task in results["tasks"].items():
        for i, (arm, own) in enumerate(task["arms"].items()):
            row = [name if i == 0 else "", Text(arm)]
            change = task.get("change", {}).get(arm)
            if task["axes"]:
                row += [figure(own[m]["mean"], ".0f", "", 100.0) for m in ("exact", "tokens")]
                row += [shown(own.get(m), m) for m in ("choice", "margin")]
                row += ["–", "–" if change is None else figure(change["margin"]["mean"], "+.2f", " nats")]
            else:
                row += ["–"] * 4 + [small(own["mean"]), "–" if change is None else percent(change["increase"])]
            out.add_row(*row, end_section=i == len(task["arms"]) - 1)
    chances = {n: t["arms"] for n, t in results["tasks"].items() if t["axes"]}
    told = [f"{n} {figure(next(iter(a.values()))['chance'], '.0f', ' %', 100.0)}" for n, a in chances.items() if next(iter(a.values()))["chance"]]  # fmt: skip
    out.caption = Text(f"Choice by chance: {', '.join(told)}." if told else "", style="dim")
    out.caption_justify = "left"
    return out
