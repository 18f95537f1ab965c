"""Heat maps of the report: layers across, options or heads down; every cell is a class of colour and a hover text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .table import figure, finite, small

LEVELS = 24
"""Number of colours of a heat map."""

LIGHT = ("#eef3f0", "#a9d8c3", "#3b9a9c", "#1f5583", "#14213f")
DARK = ("#1b232d", "#1d4c66", "#23868c", "#6cc79a", "#f1f7b5")
"""Colours from low to high on a light and on a dark page, interpolated in between."""


@dataclass(frozen=True)
class Cell:
    """One cell: its colour (None: not measured), whether it is outlined, and what it says when pointed at."""

    level: int | None
    tip: str
    picked: bool = False


@dataclass(frozen=True)
class Heat:
    """A finished heat map.

    Attributes:
        rows: ``(label, cells)``, one cell per column. columns: labels, empty where one is left out for space.
        low, high: what the ends of the colour scale stand for. wide: row labels are long.
    """

    title: str
    note: str
    alt: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]
    low: str
    high: str
    column_title: str
    row_title: str
    wide: bool = False


def ramp(stops: Sequence[str]) -> list[str]:
    """``LEVELS`` hexadecimal colours through the given stops."""
    rgb = [[int(s[i : i + 2], 16) for i in (1, 3, 5)] for s in stops]
    out = []
    for level in range(LEVELS):
        at = level / (LEVELS - 1) * (len(rgb) - 1)
        i = min(int(at), len(rgb) - 2)
        mixed = (round(a + (at - i) * (b - a)) for a, b in zip(rgb[i], rgb[i + 1], strict=True))
        out.append("#" + "".join(f"{c:02x}" for c in mixed))
    return out


def search_heats(search: Mapping[str, Any] | None) -> list[Heat]:
    """Output error, and KL where it was confirmed, of every option in every layer; the picked option is outlined."""
    if not search or not search.get("layers") or not search.get("options"):
        return []
    layers, options = search["layers"], search["options"]
    tried = [{t["option"]: t for t in layer["tried"]} for layer in layers]
    kinds = [
        ("error", "Output error of one layer", "‖out − dense‖² / ‖dense‖² of the layer's attention output; lower is better; logarithmic."),
        ("kl", "KL of the logits when only this layer changes", "Nats per token; measured for the most promising options of each layer; logarithmic."),
    ]  # fmt: skip
    heats = []
    for field, title, note in kinds:
        values = [finite(t.get(field)) for row in tried for t in row.values()]
        if all(v is None for v in values):
            continue
        level, low, high = _scale(values, logarithmic=True)
        rows = []
        for index, option in enumerate(options):
            cells = []
            for layer, row in zip(layers, tried, strict=True):
                trial, picked = row.get(index), layer.get("picked") == index
                value = None if trial is None else finite(trial.get(field))
                cells.append(Cell(level(value), _trial_tip(layer["layer"], option, trial, picked), picked))
            rows.append((option, cells))
        alt = f"{title}: {len(options)} options by {len(layers)} layers, from {small(low)} to {small(high)}; the picked options are in the policy table."
        columns = _every(str(layer["layer"]) for layer in layers)
        heats.append(
            Heat(title, note + " Outlined: picked.", alt, columns, rows, small(low), small(high), "layer", "", True)
        )
    return heats


def _trial_tip(layer: int, option: str, trial: Mapping[str, Any] | None, picked: bool) -> str:
    parts = [f"layer {layer}, {option}" + (" (picked)" if picked else "")]
    if trial is None:
        return parts[0] + "\nnot tried"
    parts.append(f"error {small(trial.get('error'))}")
    if trial.get("kl") is not None:
        parts.append(f"KL {small(trial['kl'])} nats")
    if trial.get("density") is not None:
        parts.append(f"density {figure(trial['density'])}")
    if trial.get("seconds") is not None:
        parts.append(f"{figure(trial['seconds'], '.3g', ' ms', 1000.0)}")
    return parts[0] + "\n" + ", ".join(parts[1:])


Pick = Callable[[Mapping[str, Any], int], Any]


def profile_heats(profile: Mapping[str, Any] | None) -> list[Heat]:
    """Entropy, mass on sinks and window, and keys for 90 % of the mass, of every head of every layer."""
    layers = (profile or {}).get("layers") or []
    if not layers:
        return []
    sinks, window = layers[0].get("sinks"), layers[0].get("window")

    def mean(name: str) -> Pick:
        return lambda layer, head: _at((layer.get(name) or {}).get("mean"), head)

    def mass(*names: str) -> Pick:
        def pick(layer: Mapping[str, Any], head: int) -> float | None:
            found = [finite(_at(layer.get(name), head)) for name in names]
            return None if found[0] is None else sum(v or 0.0 for v in found)

        return pick

    wanted: list[tuple[str, str, Pick, str, str, bool]] = [
        ("Entropy", "Mean over rows; low where few keys hold the mass.", mean("entropy"), ".2f", " nats", False),
        ("Mass on sinks", f"Share of the mass on the first {sinks} tokens and a learned sink.", mass("sink_mass", "learned_sink_mass"), ".3f", "", False),
        ("Mass on the window", f"Share of the mass on the last {window} tokens.", mass("window_mass"), ".3f", "", False),
        ("Keys that hold 90 %", "Mean number of keys that hold 90 % of a row's mass; logarithmic.", mean("keys90"), ",.0f", " keys", True),
    ]  # fmt: skip
    return [heat for row in wanted if (heat := _head_map(layers, *row)) is not None]


def _head_map(
    layers: Sequence[Mapping[str, Any]], title: str, note: str, pick: Pick, spec: str, unit: str, logarithmic: bool
) -> Heat | None:
    heads = max(layer.get("num_heads") or 0 for layer in layers)
    grid = [[finite(pick(layer, head)) for layer in layers] for head in range(heads)]
    known = [(v, head, i) for head, row in enumerate(grid) for i, v in enumerate(row) if v is not None]
    if not known:
        return None
    level, low, high = _scale([v for v, _, _ in known], logarithmic, share=not unit)
    names = [_layer_name(layer, i) for i, layer in enumerate(layers)]
    labels = [layer.get("labels") or [] for layer in layers]
    rows = []
    for head, row in enumerate(grid):
        cells = []
        for i, value in enumerate(row):
            label = _at(labels[i], head)
            text = figure(value, spec, unit) if value is not None else "not measured"
            cells.append(
                Cell(level(value), f"layer {names[i]}, head {head}" + (f" ({label})" if label else "") + f"\n{text}")
            )
        rows.append((str(head), cells))
    top, bottom = max(known), min(known)
    alt = (
        f"{title} by layer and head: from {figure(bottom[0], spec, unit)} (layer {names[bottom[2]]}, head {bottom[1]}) "
        f"to {figure(top[0], spec, unit)} (layer {names[top[2]]}, head {top[1]})."
    )
    return Heat(
        title, note, alt, _every(names), rows, figure(low, spec, unit), figure(high, spec, unit), "layer", "head",
    )  # fmt: skip


def _layer_name(layer: Mapping[str, Any], index: int) -> str:
    number = layer.get("layer_index", index)
    return str(number) if isinstance(number, int) and number >= 0 else str(layer.get("layer_name") or index)


def _at(values: Any, index: int) -> Any:
    return values[index] if isinstance(values, Sequence) and index < len(values) else None


def _every(names: Any) -> list[str]:
    """Column labels, thinned to about a dozen."""
    shown = list(names)
    step = next((s for s in (1, 2, 5, 10, 20, 50) if len(shown) / s <= 14), 100)
    return [name if i % step == 0 else "" for i, name in enumerate(shown)]


def _scale(
    values: Sequence[float | None], logarithmic: bool, share: bool = False
) -> tuple[Callable[[float | None], int | None], float, float]:
    """A function from value to colour level, and the values of the first and the last colour."""
    known = [v for v in values if v is not None]
    positive = [v for v in known if v > 0]
    logarithmic = logarithmic and bool(positive)
    if logarithmic:
        high = max(positive)
        low = min(*positive, high / 2)  # at least a factor of two, so that small differences look small
    else:
        low, high = (0.0, 1.0) if share else (min(0.0, *known), max(known))
    if high <= low:
        high = low * 2 if low > 0 else low + 1.0

    def level(value: float | None) -> int | None:
        if value is None:
            return None
        if logarithmic:
            share_of = math.log(max(value, low) / low) / math.log(high / low)
        else:
            share_of = (value - low) / (high - low)
        return round(min(max(share_of, 0.0), 1.0) * (LEVELS - 1))

    return level, low, high
