"""Where to spend test-time compute: model size, generation length, trials and key budget under a cost limit (Kinetics).

With recorded trials, accuracy against cost and its frontier; without them, how many tokens a limit buys. A choice per question
uses the answers: an upper bound and no policy. One choice for all questions needs no answers once it is made.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ..core.errors import ConfigError, DataError, ModelError
from .kinetics import DENSE, Method, ModelShape, at_least, decode_cost
from .kinetics_config import shape_of

CAPS = (2048, 4096, 8192, 16384, 32768)
TRIALS = (1, 2, 4, 8, 16, 32)
"""The experiments' grids of generation lengths and trials."""


@dataclass(frozen=True)
class Trace:
    """The recorded trials of one model with one method on one question.

    Attributes:
        question: its name. model: the shape. method: how it decoded. prompt: tokens. lengths: tokens generated, per trial.
        correct: whether the trial's answer was right.

    Raises:
        ConfigError: no trials, lists of different lengths, or a length below 1.
    """

    question: str
    model: ModelShape
    method: Method
    prompt: int
    lengths: tuple[int, ...]
    correct: tuple[bool, ...]

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.correct):
            raise ConfigError(
                f"question {self.question!r} has {len(self.lengths)} lengths and {len(self.correct)} verdicts; expected one of each per trial, and one trial at least."
            )
        at_least("prompt", self.prompt, 0)
        at_least("lengths", min(self.lengths), 1)


@dataclass(frozen=True)
class Choice:
    """One way to answer, its mean cost in eFLOPs and its expected accuracy.

    Attributes:
        cap: tokens after which a trial ends; None for no cap. trials: answers per question, of which one must be right.
    """

    model: str
    method: Method
    trials: int
    cap: int | None
    cost: float
    accuracy: float


def coverage(trials: int, correct: int, k: int) -> float:
    """The chance that ``k`` of ``trials`` recorded answers, drawn without replacement, hold one of the ``correct``: pass@k.

    Raises:
        ConfigError: ``k`` not from 1 to ``trials``, or ``correct`` not from 0 to ``trials``.
    """
    if not (1 <= k <= trials and 0 <= correct <= trials):
        raise ConfigError(
            f"coverage of k={k}, correct={correct}, trials={trials}; expected 1 ≤ k ≤ trials and 0 ≤ correct ≤ trials."
        )
    return 1.0 - math.comb(trials - correct, k) / math.comb(trials, k)


def choices(trace: Trace, *, trials: Sequence[int] = TRIALS, caps: Sequence[int | None] = (None,), **device: Any) -> list[Choice]:  # fmt: skip
    """Every number of trials and every cap that the trace can tell about; larger numbers of trials than recorded are left out.

    A trial that is longer than the cap costs the cap and counts as wrong, because its answer was not reached.

    Args:
        device: arguments of :func:`~foveal.policies.kinetics.decode_cost` (``intensity``, ``kv_bytes``, ``combine``, …).
    """
    out = []
    for cap in caps:
        limit = math.inf if cap is None else cap
        right = sum(ok and n <= limit for n, ok in zip(trace.lengths, trace.correct, strict=True))
        for k in (k for k in trials if k <= len(trace.lengths)):
            cost = fmean(
                decode_cost(trace.model, trace.method, prompt=trace.prompt, output=min(n, limit), trials=k, **device).total
                for n in trace.lengths
            )  # fmt: skip
            out.append(Choice(trace.model.name, trace.method, k, cap, cost, coverage(len(trace.lengths), right, k)))
    return out


def envelope(found: Iterable[Choice]) -> list[Choice]:
    """The choices that no cheaper or equally cheap one matches, by rising cost and rising accuracy."""
    out: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.cost, -c.accuracy)):
        if not out or choice.accuracy > out[-1].accuracy:
            out.append(choice)
    return out


def best_within(front: Sequence[Choice], limit: float) -> Choice | None:
    """The most accurate choice of an :func:`envelope` that costs at most ``limit``; None when all cost more."""
    i = bisect.bisect_right([c.cost for c in front], limit)
    return front[i - 1] if i else None


def oracle_accuracy(per_question: Mapping[str, Sequence[Choice]], limits: Sequence[float]) -> list[float]:
    """Mean accuracy at each cost limit when every question gets its own best choice: the paper's best-of-N frontier.

    A question for which nothing is cheap enough counts 0. An upper bound: it uses the answers.

    Raises:
        ConfigError: no questions.
    """
    if not per_question:
        raise ConfigError("an allocation was asked of no questions; expected at least one trace.")
    fronts = [envelope(found) for found in per_question.values()]
    return [fmean(c.accuracy if (c := best_within(f, limit)) else 0.0 for f in fronts) for limit in limits]


def common_choices(per_question: Mapping[str, Sequence[Choice]]) -> list[Choice]:
    """One choice for all questions: mean cost and accuracy of every choice that every question has."""
    kept: dict[tuple[str, Method, int, int | None], list[Choice]] = {}
    for found in per_question.values():
        for c in found:
            kept.setdefault((c.model, c.method, c.trials, c.cap), []).append(c)
    return [
        Choice(*key, fmean(c.cost for c in same), fmean(c.accuracy for c in same))
        for key, same in kept.items()
        if len(same) == len(per_question)
    ]


def log_spaced(low: float, high: float, count: int = 100) -> list[float]:
    """Costs from ``low`` to ``high``, both included, evenly spaced in the logarithm."""
    if not (0 < low <= high < math.inf and count >= 2):
        raise ConfigError(
            f"costs from {low} to {high} in {count} points; expected 0 < low ≤ high and two points at least."
        )
    inner = [low * (high / low) ** (i / (count - 1)) for i in range(1, count - 1)]
    return [low, *inner, high]


def affordable(shape: ModelShape, method: Method = DENSE, *, limit: float, prompt: int, trials: int = 1, **device: Any) -> int:  # fmt: skip
    """The longest generation that costs at most ``limit`` eFLOPs; 0 when not one token does.

    Raises:
        ConfigError: as :func:`~foveal.policies.kinetics.decode_cost`, and a limit that is not finite.
    """
    at_least("limit", limit, 0)

    def cost(n: int) -> float:
        return decode_cost(shape, method, prompt=prompt, output=n, trials=trials, **device).total

    high = 1
    while cost(high) <= limit:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return low


def read_traces(path: Path | str) -> list[Trace]:
    """Traces from a JSON file: a list of ``{"question", "model", "prompt", "lengths", "correct"}`` with, for sparse decoding,
    ``"budget"`` (token top-k) or ``"block"`` and ``"blocks"``. A model is a known name or a ``config.json``.

    Raises:
        DataError: no such list. ConfigError: an unknown model or a value out of range. ModelError: an unreadable configuration.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"traces {path}: cannot be read: {error}. Expected a JSON list of traces.") from None
    if not isinstance(rows, list) or not rows:
        raise DataError(f"traces {path}: expected a JSON list with at least one trace.")
    return [_trace(row, f"traces {path}, entry {i}") for i, row in enumerate(rows)]


_NEEDED, _SPARSE = ("question", "model", "prompt", "lengths", "correct"), ("budget", "block", "blocks", "local")


def _trace(row: Any, where: str) -> Trace:
    if not isinstance(row, dict) or not set(_NEEDED) <= set(row) <= {*_NEEDED, *_SPARSE}:
        keys = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"{where}: has {keys}; expected {', '.join(_NEEDED)} and at most {', '.join(_SPARSE)}.")
    try:
        shape = shape_of(str(row["model"]))
    except (ConfigError, ModelError) as error:
        raise type(error)(f"{where}: {error}") from None
    numbers = [row["prompt"], *(row[k] for k in _SPARSE if k in row)]
    lists = row["lengths"], row["correct"]
    if not all(isinstance(x, list) for x in lists) or any(
        type(n) is not int for n in itertools.chain(numbers, lists[0])
    ):
        raise DataError(f"{where}: prompt, lengths and sizes must be whole numbers, lengths and correct lists.")
    if any(type(ok) is not bool for ok in lists[1]):
        raise DataError(f"{where}: correct must be a list of true and false.")
    if "budget" in row and ("block" in row or "blocks" in row):
        raise DataError(f"{where}: has a budget and blocks; expected one or the other.")
    sizes = {k: row[k] for k in _SPARSE if k in row}
    method = Method("topk" if "budget" in row else "block_topk", **sizes) if sizes else DENSE
    return Trace(str(row["question"]), shape, method, row["prompt"], tuple(lists[0]), tuple(lists[1]))


def by_question(traces: Iterable[Trace], **options: Any) -> dict[str, list[Choice]]:
    """Question → every choice that its traces allow; ``options`` as for :func:`choices`."""
    out: dict[str, list[Choice]] = {}
    for trace in traces:
        out.setdefault(trace.question, []).extend(choices(trace, **options))
    return out
