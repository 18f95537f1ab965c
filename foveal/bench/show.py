"""What ``foveal bench`` prints: a table for each setting, and the comparison of two files."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .summary import MISSING, Comparison, Entry, Group, Unit, implementations_of, setting_text, settings, unit, unit_of


def tables(found: list[Group]) -> list[Table]:
    """One table for each setting: a row for each mask and length, a column for each implementation; the best rate in bold."""
    out, shown = [], unit(found)
    for setting in settings(found):
        own = [g for g in found if g.setting == setting]
        names = implementations_of(own)
        table = Table(
            title=Text(f"{shown.name}, {setting_text(setting)}", style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
            caption=Text("visible pairs only, median; † built a dense mask; memory and errors are in the result file", style="dim"),
            caption_justify="left",
        )  # fmt: skip
        table.add_column("mask", overflow="fold", min_width=16)
        for head in ("tokens", "density", *names, "lead"):
            table.add_column(head, justify="right", no_wrap=True)
        for group in own:
            cells = [_cell(group.entries.get(name), group.winner, shown) for name in names]
            lead = MISSING if group.lead is None else f"{group.lead:.2f}×"
            density = MISSING if group.density is None else f"{group.density:.3f}"
            table.add_row(Text(group.mask), f"{group.length:,}", density, *cells, lead)
        out.append(table)
    return out


def _cell(entry: Entry | None, winner: Entry | None, shown: Unit) -> Text:
    if entry is None or entry.tflops is None:
        status = "" if entry is None or entry.status == "unsupported" else entry.status
        return Text(status or MISSING, style="red" if status == "wrong" else "dim")
    text = shown.show(entry.tflops) + ("†" if "dense mask" in entry.note else "")
    return Text(text, style="bold green" if winner is not None and entry.impl == winner.impl else "")


def comparison_table(found: Comparison) -> Table:
    """One row for each case that ran in both; below them the geometric means."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("mask", "setting", "implementation"):
        table.add_column(head, overflow="fold")
    shown = unit_of(rate for r in found.ratios for rate in (r.a, r.b))
    for head in ("tokens", f"A {shown.name}", f"B {shown.name}", "B / A"):
        table.add_column(head, justify="right", no_wrap=True)
    for r in found.ratios:
        table.add_row(
            Text(r.mask),
            setting_text(r.setting),
            r.impl,
            f"{r.length:,}",
            shown.show(r.a),
            shown.show(r.b),
            _ratio(r.ratio),
        )
    names = list(dict.fromkeys(r.impl for r in found.ratios))
    table.add_section()
    for name in names if len(names) > 1 else []:
        table.add_row("geometric mean", "", name, "", "", "", _ratio(found.mean(name)))
    table.add_row(Text("geometric mean", style="bold"), "", "all", "", "", "", _ratio(found.mean()))
    return table


def _ratio(value: Any) -> Text:
    return Text(f"{value:.3f}", style="green" if value > 1.02 else "red" if value < 0.98 else "")
