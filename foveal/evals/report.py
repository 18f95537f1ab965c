"""The report of ``foveal eval``: one HTML file that needs nothing else, from the dictionary of ``results.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UnsupportedError
from ..tune.heat import DARK, LEVELS, LIGHT, Cell, Heat, ramp
from ..tune.journal import write_whole
from ..tune.report import facts
from ..tune.table import figure, interval, percent, small
from .curves import curves

SCHEMA = 1
NAMES = {"exact": "exact", "tokens": "tokens right", "choice": "choice", "margin": "margin"}
"""Measures of questions, as columns."""
_NEEDED = ("model", "context", "dtype", "arms", "tasks")


def write_report(results: Mapping[str, Any], path: str | Path) -> None:
    """Write the report; the file appears whole or not at all.

    Raises:
        DataError: ``results`` is of another schema or lacks a field, or the file cannot be written.
        UnsupportedError: jinja2 or matplotlib is not installed.
    """
    write_whole(Path(path), render(results))


def render(results: Mapping[str, Any]) -> str:
    """The report as a string of HTML; raises as :func:`write_report` does."""
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UnsupportedError("reports need jinja2: pip install 'foveal[report]'.") from error
    _check(results)
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("foveal.evals"), PackageLoader("foveal.tune")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(figure=figure, percent=percent, interval=interval, small=small, shown=shown, NAMES=NAMES)
    return environment.get_template("eval.html.j2").render(
        r=results,
        headline=headline(results),
        heats={name: heats(task) for name, task in results["tasks"].items()},
        curves={name: curves(task, results["context"]) for name, task in results["tasks"].items() if not task["axes"]},
        facts=_facts(results),
        light=ramp(LIGHT),
        dark=ramp(DARK),
    )


def _check(results: Mapping[str, Any]) -> None:
    if results.get("foveal_eval") != SCHEMA:
        raise DataError(
            f"results.foveal_eval is {results.get('foveal_eval')!r}; this foveal reads {SCHEMA}. Run `foveal eval` again."
        )
    for name in _NEEDED:
        if name not in results:
            raise DataError(f"results lacks the field {name!r}; expected what `foveal eval` writes to results.json.")


def headline(results: Mapping[str, Any]) -> str:
    """The result in one sentence: of the first policy where there is one."""
    model = f"{results['model']} at {results['context']:,} tokens"
    arm = results["arms"][min(1, len(results["arms"]) - 1)]["name"]
    told = []
    for name, task in results["tasks"].items():
        own = task["arms"].get(arm)
        if own is None:
            continue
        if name == "perplexity":
            rise = task["change"].get(arm)
            told.append(
                f"perplexity {percent(rise['increase'])}" if rise else f"perplexity {figure(own['mean'], '.4g')}"
            )
        elif "exact" in own:
            told.append(f"{name} {figure(own['exact']['mean'], '.0f', ' %', 100.0)}")
    own_attention = len(results["arms"]) == 1
    said = ", ".join(told) or "KL to dense alone"
    return f"{model}, {'its own attention' if own_attention else arm}: {said}."


def shown(value: Mapping[str, Any] | None, measure: str, change: bool = False) -> str:
    """A mean with its interval: shares as percentages (changes in points), margins in nats."""
    if value is None:
        return "–"
    spec = ("+" if change or measure == "margin" else "") + (".2f" if measure == "margin" else ".0f")
    factor = 1.0 if measure == "margin" else 100.0
    ends = interval(value.get("interval"))
    span = "" if ends is None else f" [{figure(ends[0], spec, '', factor)}, {figure(ends[1], spec, '', factor)}]"
    return figure(value["mean"], spec, "", factor) + span


def heats(task: Mapping[str, Any]) -> list[Heat]:
    """Of a task with questions: per measure one map for each arm, all arms on one scale."""
    if not task["axes"]:
        return []
    measures = [m for m in ("exact", "choice", "margin") if all(m in arm for arm in task["arms"].values())]
    return [_heat(task, arm, measure) for measure in measures for arm in task["arms"]]


def _heat(task: Mapping[str, Any], arm: str, measure: str) -> Heat:
    across, down = task["axes"]
    every = [cell[measure] for own in task["arms"].values() for cell in own["cells"]]
    low, high = (min(0.0, *every), max(0.0, *every)) if measure == "margin" else (0.0, 1.0)
    cells = {(cell[across], cell[down]): cell for cell in task["arms"][arm]["cells"]}
    columns, lines = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    unit, spec, factor = (" nats", "+.2f", 1.0) if measure == "margin" else (" %", ".0f", 100.0)
    rows = []
    for y in lines:
        row = []
        for x in columns:
            cell = cells.get((x, y))
            tip = f"{across} {_place(across, x)}, {down} {_place(down, y)}\n"
            if cell is None:
                row.append(Cell(None, tip + "not measured"))
                continue
            tip += f"{NAMES[measure]} {figure(cell[measure], spec, unit, factor)} of {cell['asked']} asked"
            row.append(Cell(level(cell[measure], low, high), tip))
        rows.append((_place(down, y), row))
    mean = task["arms"][arm][measure]["mean"]
    note = f"{NAMES[measure].capitalize()}; mean {figure(mean, spec, unit, factor)}."
    alt = f"{task['title']}, {arm}, {NAMES[measure]} by {across} and {down}: mean {figure(mean, spec, unit, factor)}."
    ends = (figure(low, spec, unit, factor), figure(high, spec, unit, factor))
    return Heat(arm, note, alt, [_place(across, x) for x in columns], rows, *ends, across, down)


def level(value: float, low: float, high: float) -> int:
    """Colour of a value on a linear scale."""
    share = (value - low) / (high - low) if high > low else 0.0
    return round(min(max(share, 0.0), 1.0) * (LEVELS - 1))


def _place(axis: str, value: float) -> str:
    return figure(value, ".0f", " %", 100.0) if axis == "depth" else f"{value:,g}"


def _facts(results: Mapping[str, Any]) -> Sequence[tuple[str, list[tuple[str, str]]]]:
    """Provenance, as in the report of ``foveal tune``."""
    made = dict(results.get("provenance") or {})
    machine = made.pop("machine", {})
    named = {k: results[k] for k in ("context", "dtype", "chat") if k in results}
    return facts({
        "model": results["model"], "model_info": results.get("model_info"), "text": results.get("text"), "machine": machine,
        "provenance": made, "settings": {**named, **(results.get("settings") or {})},
    })  # fmt: skip
