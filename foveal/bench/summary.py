"""Result lines of ``foveal bench`` drawn together: medians over draws, winners, and two files side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..core.errors import DataError
from .records import Row, case

MISSING = "–"
"""Stands for a figure that was not measured."""

Setting = tuple[int, int, int, str, str]
"""Query heads, key heads, head dimension, dtype, direction."""


@dataclass(frozen=True)
class Entry:
    """One implementation in one case, over all draws.

    Attributes:
        status: ``ok`` when every draw was; else what the first other draw was. why: the reason.
        tflops, milliseconds: medians over draws; None unless ok. low, high: of TFLOP/s, over draws and turns.
        error, peak_mb: the worst draw. metadata_mb: the largest. note: what to know.
    """

    impl: str
    status: str
    why: str = ""
    tflops: float | None = None
    low: float | None = None
    high: float | None = None
    milliseconds: float | None = None
    error: float | None = None
    peak_mb: float | None = None
    metadata_mb: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Group:
    """A case with every implementation that met it; ``density`` is the mean over draws."""

    mask: str
    length: int
    setting: Setting
    density: float | None
    draws: int
    entries: dict[str, Entry]

    @property
    def winner(self) -> Entry | None:
        """The highest rate; None when nothing ran."""
        ran = [e for e in self.entries.values() if e.tflops is not None]
        return max(ran, key=lambda e: e.tflops or 0.0, default=None)

    @property
    def lead(self) -> float | None:
        """The winner's rate over the next best one's; None without a second."""
        rates = sorted((e.tflops for e in self.entries.values() if e.tflops is not None), reverse=True)
        return rates[0] / rates[1] if len(rates) > 1 else None


def groups(rows: Iterable[Row]) -> list[Group]:
    """One group for each case, in the order in which they were measured."""
    by_case: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in rows:
        by_case.setdefault(case(row), {}).setdefault(row["impl"], []).append(row)
    found = []
    for (mask, length, *rest), by_impl in by_case.items():
        densities = {row["draw"]: row["density"] for rows in by_impl.values() for row in rows if "density" in row}
        entries = {impl: _entry(impl, rows) for impl, rows in by_impl.items()}
        setting: Setting = tuple(rest)  # type: ignore[assignment]
        mean = statistics.fmean(densities.values()) if densities else None
        found.append(Group(mask, length, setting, mean, max(map(len, by_impl.values())), entries))
    return found


def _entry(impl: str, rows: list[Row]) -> Entry:
    notes = "; ".join(dict.fromkeys(row["note"] for row in rows if row.get("note")))
    failed = next((row for row in rows if row["status"] != "ok"), None)

    def worst(name: str) -> float | None:
        values = [row[name] for row in rows if row.get(name) is not None]
        return max(values, default=None)

    error = max((e for e in (worst("error"), worst("grad_error")) if e is not None), default=None)
    if failed is not None:
        return Entry(impl, failed["status"], failed.get("why", ""), error=error, note=notes)
    rates = [row["tflops"] for row in rows]
    ends = [
        row["flops"] / row["seconds"][end] / 1e12 for row in rows for end in ("low", "high") if row["seconds"][end] > 0
    ]
    return Entry(
        impl, "ok", "", statistics.median(rates), min(ends, default=None), max(ends, default=None),
        1e3 * statistics.median(row["seconds"]["median"] for row in rows), error, worst("peak_mb"), worst("metadata_mb"), notes,
    )  # fmt: skip


def settings(found: Iterable[Group]) -> list[Setting]:
    """Head layouts, dtypes and directions that occur."""
    return list(dict.fromkeys(group.setting for group in found))


def setting_text(setting: Setting) -> str:
    """``"8 query and 2 key heads of 64, float32, forward"``."""
    heads, kv_heads, dim, dtype, direction = setting
    layout = f"{heads} heads" if heads == kv_heads else f"{heads} query and {kv_heads} key heads"
    return f"{layout} of {dim}, {dtype}, {direction}"


@dataclass(frozen=True)
class Unit:
    """What rates are shown in: ``factor`` times TFLOP/s."""

    name: str
    factor: float

    def show(self, tflops: float | None) -> str:
        """Three significant digits, or "–"."""
        if tflops is None:
            return MISSING
        value = self.factor * tflops
        return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def unit_of(rates: Iterable[float | None]) -> Unit:
    """TFLOP/s, or GFLOP/s where nothing reaches 1 TFLOP/s."""
    return Unit("GFLOP/s", 1e3) if max((r for r in rates if r is not None), default=1.0) < 1 else Unit("TFLOP/s", 1.0)


def unit(found: Iterable[Group]) -> Unit:
    """The unit for these cases together."""
    return unit_of(e.tflops for g in found for e in g.entries.values())


def implementations_of(found: Iterable[Group]) -> list[str]:
    """Implementations that ran at least once, in order."""
    return list(dict.fromkeys(e.impl for group in found for e in group.entries.values() if e.tflops is not None))


def refusals(found: Iterable[Group]) -> list[tuple[str, str, list[str]]]:
    """``(implementation, reason, masks)`` of everything without a rate; masks with their direction where both were measured."""
    found = list(found)
    several = len({group.setting[-1] for group in found}) > 1
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for group in found:
        where = f"{group.mask} {group.setting[-1]}" if several else group.mask
        for entry in group.entries.values():
            if entry.status != "ok":
                told = entry.why if entry.status == "unsupported" else f"{entry.status}: {entry.why}"
                reasons.setdefault((entry.impl, told), {})[where] = None
    return [(impl, why, list(masks)) for (impl, why), masks in reasons.items()]


def wins(found: Iterable[Group]) -> dict[str, int]:
    """Cases won by each implementation, most first; cases with a single runner do not count."""
    count: dict[str, int] = {}
    for group in found:
        if group.winner is not None and group.lead is not None:
            count[group.winner.impl] = count.get(group.winner.impl, 0) + 1
    return dict(sorted(count.items(), key=lambda item: -item[1]))


@dataclass(frozen=True)
class Ratio:
    """One case of two files: B's rate over A's."""

    mask: str
    length: int
    setting: Setting
    impl: str
    a: float
    b: float

    @property
    def ratio(self) -> float:
        return self.b / self.a


@dataclass(frozen=True)
class Comparison:
    """Two result files.

    Attributes:
        ratios: cases that ran in both. missing: ``(case, reason)`` of those that did not.
        differ: settings and machines that differ, ``(name, A, B)``.
    """

    ratios: list[Ratio]
    missing: list[tuple[str, str]]
    differ: list[tuple[str, Any, Any]]

    def mean(self, impl: str | None = None) -> float | None:
        """Geometric mean of the ratios, of one implementation or of all; None without any."""
        found = [r.ratio for r in self.ratios if impl in (None, r.impl)]
        return statistics.geometric_mean(found) if found else None


def compare(a: tuple[Mapping[str, Any], list[Row]], b: tuple[Mapping[str, Any], list[Row]]) -> Comparison:
    """Put two files, as ``records.read`` gives them, side by side.

    Raises:
        DataError: they have no case in common.
    """
    sides = [
        {(g.mask, g.length, g.setting, e.impl): e for g in groups(rows) for e in g.entries.values()}
        for _, rows in (a, b)
    ]
    ratios, missing = [], []
    for at in dict.fromkeys([*sides[0], *sides[1]]):
        mine, other = (side.get(at) for side in sides)
        if mine is not None and other is not None and mine.tflops and other.tflops:
            ratios.append(Ratio(*at, mine.tflops, other.tflops))
            continue
        told = [
            f"{name}: {'absent' if e is None else 'ok' if e.tflops else e.status}"
            for name, e in zip("AB", (mine, other), strict=True)
        ]
        if any(e is None or e.tflops for e in (mine, other)):
            missing.append((f"{at[0]}, {at[1]} tokens, {setting_text(at[2])}, {at[3]}", ", ".join(told)))
    if not ratios:
        raise DataError(
            "the two result files have no case that ran in both; expected the same masks, lengths, heads and implementations."
        )
    before, after = (head.get("settings") or {} for head, _ in (a, b))
    differ = [
        (n, before.get(n), after.get(n)) for n in dict.fromkeys([*before, *after]) if before.get(n) != after.get(n)
    ]
    return Comparison(ratios, missing, differ)
