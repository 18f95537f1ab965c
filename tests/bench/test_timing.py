"""Interleaved timing: order, counts, and ratios turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from foveal.bench.timing import Spread, interleaved, speedups
from foveal.core.errors import ConfigError


class FakeClock:
    """Time moves only when a job says so."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def job(self, durations: Iterator[float], log: list[str], name: str) -> Callable[[], None]:
        def run() -> None:
            log.append(name)
            self.time += next(durations)

        return run


def test_every_turn_runs_every_job_and_the_order_alternates() -> None:
    clock, log = FakeClock(), []
    jobs = {name: clock.job(iter([1.0] * 9), log, name) for name in "abc"}
    seconds = interleaved(jobs, 2, warmup=1, clock=clock)
    assert "".join(log) == "cba" + "abc" + "cba"
    assert seconds == {name: [1.0, 1.0] for name in "abc"}


def test_warm_up_is_not_measured() -> None:
    clock, log = FakeClock(), []
    seconds = interleaved({"a": clock.job(iter([50.0, 1.0, 2.0]), log, "a")}, 2, warmup=1, clock=clock)
    assert seconds == {"a": [1.0, 2.0]}


def test_short_jobs_are_repeated_and_their_median_counts() -> None:
    clock, log = FakeClock(), []
    jobs = {
        "short": clock.job(iter([9.0, 1.0, 1.0, 3.0, 2.0, 4.0]), log, "s"),
        "long": clock.job(iter([9.0, 7.0, 8.0]), log, "l"),
    }
    seconds = interleaved(jobs, 2, warmup=1, at_least=5.0, clock=clock)
    assert "".join(log) == "ls" + "sssl" + "lss"
    assert seconds == {"short": [1.0, 3.0], "long": [7.0, 8.0]}


def test_speedups_compare_within_a_turn() -> None:
    """A machine that is ten times slower in one turn changes no ratio."""
    ratios = speedups({"base": [4.0, 40.0, 4.0], "fast": [2.0, 20.0, 2.0]}, "base")
    assert ratios["fast"] == Spread(2.0, 2.0, 2.0, 3)
    assert ratios["base"].median == 1.0


def test_spread_holds_median_and_quartiles() -> None:
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0, 1)


def test_refusals_name_the_value() -> None:
    with pytest.raises(ConfigError, match="repeats is 0"):
        interleaved({}, 0)
    for wrong in ("nan", "inf"):
        with pytest.raises(ConfigError, match=f"at_least {wrong}"):
            interleaved({}, 1, at_least=float(wrong))
    with pytest.raises(ConfigError, match=r"baseline 'x'.*expected one of a"):
        speedups({"a": [1.0]}, "x")
    with pytest.raises(ConfigError, match="at least one"):
        Spread.of([])
