"""From what was read to figures: means with bootstrap intervals, for each arm alone and paired against dense.

Questions are resampled one by one, and positions of a passage in blocks of neighbours, because neighbouring losses go together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.bootstrap import bootstrap

BLOCK, BINS = 64, 12
"""Neighbouring positions that stay together, bins of a curve."""

Figures = dict[str, Any]


# --- questions --------------------------------------------------------------------------------------------------------


def choice(ask: Mapping[str, Any]) -> float:
    """Share of a hit: 1 when the right answer is more probable than all others; ties are shared."""
    best = max(ask["logp"], *ask["others"])
    return (ask["logp"] == best) / sum(p == best for p in (ask["logp"], *ask["others"]))


def margin(ask: Mapping[str, Any]) -> float:
    """Nats between the right answer and the best wrong one; without wrong ones, per token to the best other token."""
    gap: float = ask["logp"] - max(ask["others"]) if ask["others"] else ask["gap"]
    return gap


MEASURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "exact": lambda ask: float(ask["right"] == ask["tokens"]),
    "tokens": lambda ask: ask["right"] / ask["tokens"],
    "choice": choice,
    "margin": margin,
}
"""Figures of a question: all tokens decoded right; their share; the right one of the answers preferred; the margin in nats."""


def asked(units: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Per measure its value for every question of the units, in order; ``choice`` only where there are wrong answers."""
    asks = [ask for unit in units for ask in unit["asks"]]
    wanted = [name for name in MEASURES if name != "choice" or all(ask["others"] for ask in asks)]
    return {name: [MEASURES[name](ask) for ask in asks] for name in wanted}


def quiz_figures(units: Sequence[Mapping[str, Any]], axes: tuple[str, str], seed: int) -> Figures:
    """Means, intervals and the cells of the heat map for one arm."""
    values = asked(units)
    asks = [ask for unit in units for ask in unit["asks"]]
    where = [(ask["at"].get(axes[0]), ask["at"].get(axes[1])) for ask in asks]
    cells = []
    for place in sorted(set(where)):
        own = [i for i, w in enumerate(where) if w == place]
        means = {name: round(float(np.mean([row[i] for i in own])), 5) for name, row in values.items()}
        cells.append({axes[0]: place[0], axes[1]: place[1], "asked": len(own), **means})
    return {
        "asked": len(asks),
        **{name: _mean(row, seed) for name, row in values.items()},
        "chance": round(float(np.mean([1 / (1 + len(ask["others"])) for ask in asks])), 5) if "choice" in values else None,
        "cells": cells,
    }  # fmt: skip


def quiz_change(units: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], seed: int) -> Figures:
    """Paired differences, arm − dense, of every measure."""
    own, base = asked(units), asked(dense)
    return {name: _mean([a - b for a, b in zip(row, base[name], strict=True)], seed) for name, row in own.items()}


def _mean(values: Sequence[float], seed: int) -> Figures:
    return {"mean": round(float(np.mean(values)), 5), "interval": bootstrap(values, seed)}


# --- passages ---------------------------------------------------------------------------------------------------------


def blocks(position: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[int]]:
    """Means of blocks of :data:`BLOCK` neighbouring positions, and how many values each holds."""
    number = np.asarray(position) // BLOCK
    _, at = np.unique(number, return_inverse=True)
    count = np.bincount(at)
    return (np.bincount(at, weights=np.asarray(values, dtype=np.float64)) / count).tolist(), count.tolist()


def passage_figures(units: Sequence[Mapping[str, Any]], measure: str, length: int, seed: int) -> Figures:
    """Perplexity or mean KL over all passages, with its interval, and its curve over positions, for one arm."""
    name = "position" if measure == "nll" else "kl_position"
    means, counts = _blocks(units, name, measure)
    mean, interval = float(np.average(means, weights=counts)), bootstrap(means, seed, counts)
    edges = np.linspace(0, length, BINS + 1)
    position = np.concatenate([unit[name] for unit in units])
    value = np.concatenate([unit[measure] for unit in units])
    bins = np.clip(np.searchsorted(edges, position, side="right") - 1, 0, BINS - 1)
    curve = []
    for i in range(BINS):
        own = value[bins == i]
        if len(own):
            curve.append({"from": int(edges[i]), "to": int(edges[i + 1]), "scored": len(own), "mean": _shown(float(own.mean()), measure)})  # fmt: skip
    return {
        "passages": len(units),
        "scored": len(value),
        "mean": _shown(mean, measure),
        "interval": None if interval is None else [_shown(x, measure) for x in interval],
        "curve": curve,
        "density": round(float(np.mean([unit["density"] for unit in units])), 5),
    }


def passage_change(units: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], seed: int) -> Figures:
    """Relative increase of perplexity over dense from the paired losses, with its interval."""
    paired = [
        {"position": own["position"], "nll": np.subtract(own["nll"], base["nll"])}
        for own, base in zip(units, dense, strict=True)
    ]
    means, counts = _blocks(paired, "position", "nll")
    interval = bootstrap(means, seed, counts)
    return {
        "increase": round(math.expm1(float(np.average(means, weights=counts))), 6),
        "interval": None if interval is None else [round(math.expm1(x), 6) for x in interval],
    }


def _blocks(units: Sequence[Mapping[str, Any]], position: str, value: str) -> tuple[list[float], list[int]]:
    parts = [blocks(unit[position], unit[value]) for unit in units]
    return [m for means, _ in parts for m in means], [c for _, counts in parts for c in counts]


def _shown(mean: float, measure: str) -> float:
    return round(math.exp(min(mean, 700.0)) if measure == "nll" else mean, 6)
