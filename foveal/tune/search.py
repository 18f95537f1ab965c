"""Find a pattern for each layer: score all, confirm the best by the logits, choose the cheapest inside the budget, re-measure.

1. Options are scored in every layer and the best confirmed on several texts (see ``survey``).
2. A knapsack picks one option per layer: least time with the sum of KLs under a limit. The sum only guides the choice.
3. The whole policy is measured at the full context on the search texts; it must stay inside the allowed loss on *each* of
   them, so that it has a chance to hold on a text that the search did not see: of K + 1 texts that are alike, a new one is
   the worst in one case of K + 1. When it costs more, the limit shrinks and step 2 is repeated.

What is reported in the end is measured again on held-out text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..patterns import Pattern
from ..policies.policy import Policy, Rule
from .journal import Journal
from .meter import Meter
from .survey import Confirmer, Survey, Trial, shortlist, survey

ROUNDS = 5


@dataclass
class Found:
    """What the search found.

    Attributes:
        options: the patterns tried; option 0 is dense.
        trials: per layer, one trial per option. picked: per layer, the option chosen.
        texts: how many texts it was searched on.
        rounds: for each round the limit on the sum of KLs, the predicted sum, and the measured increase of perplexity on the
            worst text measured (a text that breaks the limit ends the round).
    """

    options: list[Pattern]
    trials: list[list[Trial]]
    picked: list[int]
    texts: int
    rounds: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        layers = [
            {"layer": i, "tried": [vars(t) for t in trials], "picked": self.picked[i]}
            for i, trials in enumerate(self.trials)
        ]
        return {"options": [str(p) for p in self.options], "texts": self.texts, "layers": layers, "rounds": self.rounds}


def choose(trials: Sequence[Sequence[Trial]], limit: float, bins: int = 2000) -> list[int]:
    """Step 3: one option per layer with the least total time whose KLs sum to at most ``limit`` (exact up to ``limit/bins``).

    Dense (option 0) costs no KL; of the others only confirmed trials may be chosen.
    """
    unit = limit / bins
    best = [0.0] + [math.inf] * bins
    back: list[list[int]] = []
    for layer in trials:
        usable = [(t.option, t.seconds, 0 if t.option == 0 else math.ceil((t.kl or 0.0) / unit)) for t in layer if t.option == 0 or t.kl is not None]  # fmt: skip
        grown, came = [math.inf] * (bins + 1), [0] * (bins + 1)
        for option, seconds, weight in usable:
            for spent in range(weight, bins + 1):
                value = best[spent - weight] + seconds
                if value < grown[spent]:
                    grown[spent], came[spent] = value, option
        best = grown
        back.append(came)
    at = min(range(bins + 1), key=lambda s: best[s])
    picked: list[int] = []
    for layer, came in zip(reversed(trials), reversed(back), strict=True):
        option = came[at]
        picked.append(option)
        if option:
            kl = next(t.kl for t in layer if t.option == option)
            at -= math.ceil((kl or 0.0) / unit)
    return picked[::-1]


def search(
    meter: Meter,
    ids: Tensor,
    options: Sequence[Pattern],
    max_increase: float,
    journal: Journal,
    decode_of: Callable[[Pattern], Pattern | None],
    tick: Callable[[str], None],
) -> tuple[Found, Policy]:
    """All steps over the search texts ``ids`` ``(S, N)``.

    Args:
        options: patterns; the first is dense.
        max_increase: largest relative increase of perplexity.
        journal: finished steps are read from and written to it.
        decode_of: the pattern to decode with after prefilling with one (None: the same).
        tick: called with a line after each finished unit of work.
    """
    trials = _confirmed(meter, ids, options, journal, tick)
    return _assemble(meter, ids, options, trials, max_increase, journal, decode_of, tick)


def _confirmed(
    meter: Meter, ids: Tensor, options: Sequence[Pattern], journal: Journal, tick: Callable[[str], None]
) -> list[list[Trial]]:
    """Step 1."""
    known = _read_scores(journal)
    surveys: list[Survey] = []
    if known is None or any(f"search.kl.{i}" not in journal for i in range(len(known))):
        for number, text in enumerate(ids.split(1)):
            scores = known if number == 0 else _read_scores(journal)
            surveys.append(survey(meter, text, options, scores, lambda: tick("scoring layers")))
            if number == 0 and known is None:
                journal.put("search.scores", {"trials": [[vars(t) for t in row] for row in surveys[0].trials]})
        journal.put("search.dense", {"nll": [s.nll for s in surveys]})
    trials = _read_scores(journal)
    assert trials is not None
    confirmers = [Confirmer(meter, found) for found in surveys]
    for layer, row in enumerate(trials):
        key = f"search.kl.{layer}"
        if key not in journal:
            journal.put(key, {"kl": {str(o): [c.kl(layer, o) for c in confirmers] for o in shortlist(row)}})
        for option, by_text in journal[key]["kl"].items():
            row[int(option)].kl = max(by_text)
        tick(f"confirming layer {layer}")
    return trials


def _read_scores(journal: Journal) -> list[list[Trial]] | None:
    if "search.scores" not in journal:
        return None
    return [[Trial(**t) for t in row] for row in journal["search.scores"]["trials"]]


class _Whole:
    """Measures whole policies on the search texts, the text that was worst so far first."""

    def __init__(self, meter: Meter, ids: Tensor, limit: float, journal: Journal) -> None:
        self.meter, self.texts, self.limit, self.journal = meter, ids.split(1), limit, journal
        self.dense: list[float] = journal["search.dense"]["nll"]
        self.order = list(range(len(self.texts)))

    def increase(self, picked: Sequence[int], policy: Policy) -> float:
        """The largest increase of perplexity over the texts, or the first found that breaks the limit."""
        worst = -math.inf
        for text in list(self.order):
            key = f"search.whole.{text}." + "-".join(map(str, picked))
            if key not in self.journal:
                got = self.meter.quality(self.texts[text], policy, what="the searched policy")
                self.journal.put(key, {"increase": math.expm1(float(got.nll.mean()) - self.dense[text])})
            increase = self.journal[key]["increase"]
            if increase > worst:
                worst = increase
                self.order.remove(text)
                self.order.insert(0, text)
            if increase > self.limit:
                break
        return worst


def _assemble(meter: Meter, ids: Tensor, options: Sequence[Pattern], trials: list[list[Trial]], max_increase: float, journal: Journal, decode_of: Callable[[Pattern], Pattern | None], tick: Callable[[str], None]) -> tuple[Found, Policy]:  # fmt: skip
    """Steps 2 and 3."""
    whole = _Whole(meter, ids, max_increase, journal)
    limit, lowest_bad = math.log1p(max_increase), math.inf
    best: tuple[float, list[int]] = (sum(row[0].seconds for row in trials), [0] * len(trials))
    found = Found(list(options), trials, best[1], len(whole.texts))
    tried: dict[tuple[int, ...], float] = {tuple(best[1]): 0.0}
    for _ in range(ROUNDS):
        picked = choose(trials, limit)
        if tuple(picked) not in tried:
            tried[tuple(picked)] = whole.increase(picked, _policy(options, picked, decode_of))
        increase = tried[tuple(picked)]
        predicted = sum(row[o].kl or 0.0 for row, o in zip(trials, picked, strict=True))
        found.rounds.append({"limit_kl": limit, "predicted_kl": predicted, "measured_ppl_increase": increase})
        tick(f"policy within KL {limit:.4f}: perplexity {increase:+.2%}")
        if increase <= max_increase:
            seconds = sum(row[o].seconds for row, o in zip(trials, picked, strict=True))
            if seconds < best[0]:
                best = (seconds, picked)
            if all(o == min(row, key=lambda t: t.seconds if t.option == 0 or t.kl is not None else math.inf).option for row, o in zip(trials, picked, strict=True)):  # fmt: skip
                break  # nothing faster is left to choose
            limit = min(limit * 2, (limit + lowest_bad) / 2)
        else:
            lowest_bad = min(lowest_bad, limit)
            limit = limit * min(max(max_increase / increase, 0.2), 0.5)
    found.picked = best[1]
    return found, _policy(options, best[1], decode_of)


def _policy(
    options: Sequence[Pattern], picked: Sequence[int], decode_of: Callable[[Pattern], Pattern | None]
) -> Policy:
    rules = tuple((i, Rule(options[o], decode_of(options[o]))) for i, o in enumerate(picked))
    return Policy(layers=rules, name="per layer")
