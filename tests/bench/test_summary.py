"""Lines drawn together: medians over draws, winners, reasons, and two files side by side."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from foveal.bench.records import key
from foveal.bench.show import comparison_table, tables
from foveal.bench.summary import compare, groups, refusals, setting_text, settings, unit, wins
from foveal.core.errors import DataError

from .lines import header, line, lines


def test_winner_lead_and_wins() -> None:
    found = groups(lines())
    assert len(found) == 4 * 4 * 2 and len(settings(found)) == 2
    first = found[0]
    assert first.winner is not None and first.winner.impl == "sdpa" and first.lead == pytest.approx(0.45 / 0.4)
    assert wins(found) == {"native": 23, "sdpa": 8}, "a case with one runner has no winner"
    assert setting_text(first.setting) == "8 query and 2 key heads of 64, float32, forward"


def test_draws_are_medians_and_one_failure_is_a_failure() -> None:
    rows = [line("causal_document", 512, "sdpa", rate, draw) for draw, rate in enumerate((1.0, 5.0, 2.0))]
    (group,) = groups(rows)
    entry = group.entries["sdpa"]
    assert group.draws == 3 and entry.tflops == 2.0 and group.lead is None
    assert entry.low == pytest.approx(1.0 / 1.2) and entry.high == pytest.approx(5.0 / 0.9)
    rows[1] |= {"status": "oom", "why": "no room"}
    (group,) = groups(rows)
    assert group.entries["sdpa"].tflops is None and group.winner is None
    assert refusals([group]) == [("sdpa", "oom: no room", ["causal_document"])]


def test_refusals_are_told_once() -> None:
    told = {(name, why.partition(":")[0]): masks for name, why, masks in refusals(groups(lines()))}
    assert len(told) == 3 and len(told["flex", "has no backward on CPU; use impl='gather'"]) == 4
    assert told["sdpa", "wrong"] == told["gather", "oom"] == ["uniform_block_sparse:keep=0.2 backward"]


def test_small_rates_are_shown_in_gflops() -> None:
    found = groups(lines())
    assert unit(found).name == "GFLOP/s" and unit(found).show(0.4) == "400" and unit(found).show(0.0123) == "12.3"
    fast = groups([line("full", 64, "sdpa", 612.0), line("full", 64, "flex", 0.5)])
    assert unit(fast).show(612.0) == "612" and unit(fast).show(0.5) == "0.500" and unit(fast).show(None) == "–"


def test_printed_tables() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    for table in tables(groups(lines())):
        console.print(table)
    text = console.export_text()
    assert "GFLOP/s, 8 query and 2 key heads of 64, float32, backward" in text and "450" in text
    assert "wrong" in text and "oom" in text and "330†" in text


def test_comparison_by_case() -> None:
    ours, theirs = lines(), lines()
    for row in theirs:
        if "tflops" in row:
            row["tflops"] *= 2.0 if row["impl"] == "native" else 0.5
    only_a = next(r for r in theirs if r["impl"] == "gather")
    theirs = [row for row in theirs if key(row) != key(only_a)]
    found = compare((header(), ours), (header(repeats=9), theirs))
    assert found.mean("native") == pytest.approx(2.0) and found.mean("sdpa") == pytest.approx(0.5)
    counts = {name: sum(r.impl == name for r in found.ratios) for name in ("native", "gather", "sdpa", "flex")}
    assert counts == {"native": 32, "gather": 30, "sdpa": 31, "flex": 16}
    assert found.mean() == pytest.approx(2.0 ** ((32 - 77) / 109))
    assert found.missing == [
        ("causal, 1024 tokens, 8 query and 2 key heads of 64, float32, forward, gather", "A: ok, B: absent")
    ]
    assert found.differ == [("repeats", 5, 9)]
    assert comparison_table(found).row_count == 109 + 5


def test_files_without_a_common_case() -> None:
    with pytest.raises(DataError, match="no case that ran in both"):
        compare((header(), [line("full", 64, "sdpa", 1.0)]), (header(), [line("causal", 64, "sdpa", 1.0)]))
