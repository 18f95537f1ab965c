"""The report of ``foveal bench``: one HTML file that needs nothing else, from the lines of ``results.jsonl``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UnsupportedError
from .plots import colour, throughput_svg
from .records import Row
from .summary import (
    MISSING,
    Entry,
    Group,
    Setting,
    Unit,
    groups,
    implementations_of,
    refusals,
    setting_text,
    settings,
    unit,
    wins,
)


@dataclass(frozen=True)
class Cell:
    """One cell of the map of winners: its colour (None: nothing ran), its text, and what it says when pointed at."""

    colour: str | None
    text: str
    tip: str


@dataclass(frozen=True)
class Section:
    """One setting: its plot, its map of winners (rows of ``(mask, cells)``), and its cases."""

    title: str
    plot: str | None
    lengths: list[int]
    winners: list[tuple[str, list[Cell]]]
    names: list[str]
    cases: list[Group]


def write_report(header: Mapping[str, Any], rows: list[Row], path: Path | str) -> None:
    """Write the report; the file appears whole or not at all.

    Args:
        header, rows: as ``records.read`` gives them. path: of the HTML file.

    Raises:
        DataError: there are no lines, or the file cannot be written. UnsupportedError: jinja2 or matplotlib is not installed.
    """
    path = Path(path)
    html = render(header, rows)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(f"the report {path} cannot be written: {error}. Choose another folder with --out.") from None


def render(header: Mapping[str, Any], rows: list[Row]) -> str:
    """The report as a string of HTML; raises as :func:`write_report` does."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UnsupportedError("reports need jinja2: pip install 'foveal[report]'.") from error
    found = groups(rows)
    if not found:
        raise DataError("the result file has no case yet; expected at least one. Let foveal bench finish a case.")
    environment = Environment(
        loader=PackageLoader("foveal.bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = unit(found)
    environment.globals.update(rate=shown.show, unit=shown.name, MISSING=MISSING, small=small)
    return environment.get_template("bench.html.j2").render(
        headline=headline(found),
        sections=[section(found, setting, shown) for setting in settings(found)],
        refusals=refusals(found),
        facts=facts(header),
        settings=header.get("settings") or {},
        cases=len(found),
    )


def headline(found: list[Group]) -> str:
    """Who wins how often, in one sentence."""
    won, total = wins(found), sum(g.lead is not None for g in found)
    if not total:
        names = implementations_of(found)
        return f"Only {names[0]} ran: there is nothing to compare." if names else "Nothing ran."
    best, count = next(iter(won.items()))
    leads = [g.lead for g in found if g.lead is not None and g.winner is not None and g.winner.impl == best]
    return (
        f"{best} is fastest in {count} of {total} cases, by {statistics.geometric_mean(leads):.2f}× over the next best."
    )


def section(found: list[Group], setting: Setting, shown: Unit) -> Section:
    """One setting of the report; the plot needs two lengths."""
    own = [g for g in found if g.setting == setting]
    lengths = sorted({g.length for g in own})
    at = {(g.mask, g.length): g for g in own}
    masks = list(dict.fromkeys(g.mask for g in own))
    winners = [(mask, [_cell(mask, n, at.get((mask, n)), shown) for n in lengths]) for mask in masks]
    plot = throughput_svg(own, setting, shown) if len(lengths) > 1 and implementations_of(own) else None
    return Section(setting_text(setting), plot, lengths, winners, implementations_of(own), own)


def _cell(mask: str, length: int, group: Group | None, shown: Unit) -> Cell:
    name = f"{mask}, {length:,} tokens"
    if group is None or group.winner is None:
        return Cell(None, MISSING, f"{name}\n{'not measured' if group is None else 'nothing ran'}")
    lines = [f"{e.impl}: {shown.show(e.tflops)} {shown.name}" for e in _ranked(group)]
    lead = "" if group.lead is None else f" {group.lead:.1f}×"
    return Cell(colour(group.winner.impl), f"{group.winner.impl}{lead}", "\n".join([name, *lines]))


def _ranked(group: Group) -> list[Entry]:
    return sorted((e for e in group.entries.values() if e.tflops is not None), key=lambda e: -(e.tflops or 0.0))


def small(value: float | None) -> str:
    """A figure that may be tiny: 0.012, 8.3e-07, 1,024."""
    if value is None:
        return MISSING
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def facts(header: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings and provenance as ``(group, [(name, value)])``."""
    where = dict(header.get("provenance") or {})
    machine = where.pop("machine", None) or {}
    run = {k: v for k, v in (header.get("settings") or {}).items() if k not in ("machine", "torch", "foveal", "commit")}
    parts = (("Run", run), ("Machine", machine), ("Software", where))
    return [(name, [(k.replace("_", " "), _text(v)) for k, v in values.items()]) for name, values in parts if values]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return MISSING if value is None else str(value)
