"""Time several pieces of work against each other: in turns, so that whatever else the machine does hits all alike."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..core.errors import ConfigError

Clock = Callable[[], float]
SHORT = 0.3
"""Seconds below which a single call says too little beside one of seconds; see ``at_least`` of :func:`interleaved`."""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, and how many there were."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Raises :class:`ConfigError` for an empty list."""
        if not values:
            raise ConfigError("a spread was asked of no measurements; expected at least one. Use repeats of 1 or more.")
        low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
        return cls(statistics.median(values), low, high, len(values))

    def json(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(
    jobs: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    at_least: float = 0.0,
    device: torch.device | str = "cpu",
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every job in every turn: all jobs once per turn, in alternating order.

    Args:
        jobs: name → callable without arguments.
        repeats: turns. warmup: unmeasured turns before them (compilation, caches, lazy initialisation).
        at_least: seconds. A job that is done sooner is called again until so much time has passed, and the median of its calls counts:
            beside a job that takes seconds, one short call says more about its moment than about the job, and the first ones
            may touch memory that the system has taken back meanwhile.
        device: on CUDA every measurement begins and ends with all kernels finished.
        clock: what tells the time, in seconds.

    Returns:
        name → ``repeats`` measurements; entry ``i`` of all lists belongs to turn ``i``.

    Raises:
        ConfigError: ``repeats`` below 1, ``warmup`` below 0, ``at_least`` below 0 or without end.
    """
    if repeats < 1 or warmup < 0 or not 0 <= at_least < math.inf:
        raise ConfigError(
            f"repeats is {repeats}, warmup {warmup} and at_least {at_least}; expected repeats of at least 1, the others of at least 0, "
            "and a finite time."
        )
    cuda = torch.device(device).type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return clock()

    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(-warmup, repeats):
        for name in list(jobs)[:: 1 if turn % 2 == 0 else -1]:
            start, ends = now(), list[float]()
            while not ends or ends[-1] - start < at_least:
                jobs[name]()
                ends.append(now())
            if turn >= 0:
                seconds[name].append(statistics.median(b - a for a, b in itertools.pairwise([start, *ends])))
    return seconds


def speedups(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, Spread]:
    """How many times faster than ``baseline`` each job ran: the spread of the ratios turn by turn.

    Raises:
        ConfigError: ``baseline`` is no job.
    """
    if baseline not in seconds:
        raise ConfigError(f"baseline {baseline!r} was not measured; expected one of {', '.join(sorted(seconds))}.")
    return {
        name: Spread.of([base / own for base, own in zip(seconds[baseline], values, strict=True)])
        for name, values in seconds.items()
    }
