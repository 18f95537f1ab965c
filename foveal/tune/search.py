"""Find a pattern for each layer: score all, confirm the best by the logits, choose the cheapest inside the budget, re-measure.

1. One dense forward; at every layer each option attends to the same q, k, v: output error and time.
2. The two most promising options of each layer are confirmed: only that layer changes, for a block of rows in the text's last
   third after a dense prefix, and the KL of the logits to the dense model's is measured. The rows keep what the option chose
   for them in the whole text, so options that treat the end of a prompt specially gain nothing by it.
3. A knapsack picks one option per layer: least time with the sum of KLs under a limit. The sum only guides the choice.
4. The whole policy is measured at the full context on the search text; when it costs more than allowed the limit shrinks
   and step 3 is repeated. What is reported in the end is measured again on held-out text.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.context import SelectContext, State
from ..core.errors import UnsupportedError
from ..core.layouts import Groups, KeySelection, Layout, block_mask, block_mask_kinds
from ..hf import AttentionEvent
from ..kernels.dispatch import compute
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..policies.policy import Policy, Rule
from .journal import Journal
from .meter import Meter

ROWS = 128
"""Rows whose logits confirm an option."""
ROUNDS = 5


@dataclass
class Trial:
    """One option in one layer.

    Attributes:
        option: index into the options. error: ‖out − dense‖² / ‖dense‖² of the layer's attention output.
        seconds: one attention call at the full context, selection included. kl: nats, None when not confirmed.
    """

    option: int
    error: float
    seconds: float
    kl: float | None = None


@dataclass
class Found:
    """What the search found.

    Attributes:
        options: the patterns tried; option 0 is dense.
        trials: per layer, one trial per option. picked: per layer, the option chosen.
        rounds: for each round the limit on the sum of KLs, the predicted sum, and the measured increase of perplexity.
    """

    options: list[Pattern]
    trials: list[list[Trial]]
    picked: list[int]
    rounds: list[dict[str, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        layers = [
            {"layer": i, "tried": [vars(t) for t in trials], "picked": self.picked[i]}
            for i, trials in enumerate(self.trials)
        ]
        return {"options": [str(p) for p in self.options], "layers": layers, "rounds": self.rounds}


Scored = tuple[list[list[Trial]], list[list[Layout | None]]]
"""Per layer and option: the trial, and what the option keeps in the confirmed rows."""


def score_layers(meter: Meter, ids: Tensor, options: Sequence[Pattern], tick: Callable[[], None]) -> Scored:
    """Step 1: output error and time of every option in every layer, from one dense forward over ``ids`` ``(1, N)``."""
    trials: list[list[Trial]] = []
    kept: list[list[Layout | None]] = []
    first, last = confirmed_rows(ids.shape[1])

    def probe(event: AttentionEvent) -> None:
        if event.role != "self":
            return
        dense, row, slices = event.out.float(), [], []
        size = float(dense.square().sum())
        for index, pattern in enumerate(options):
            start = time.perf_counter()
            layout, _ = pattern.select(event.call.q, event.call.k, event.ctx, None)
            out, _ = compute(event.call.replace(layout=layout), meter.impl, event.sink_logits)
            if out.device.type == "cuda":
                torch.cuda.synchronize(out.device)
            seconds = time.perf_counter() - start
            row.append(Trial(index, float((out.float() - dense).square().sum()) / max(size, 1e-30), seconds))
            slices.append(rows_of(layout, first, last))
        trials.append(row)
        kept.append(slices)
        tick()

    with meter.under(Policy.uniform(Dense()), (probe,)):
        meter.forward(ids, 1, use_cache=False)
    return trials, kept


def confirmed_rows(length: int) -> tuple[int, int]:
    """The block of rows that confirms options: ``ROWS`` rows that begin at a multiple of ``ROWS`` in the last third."""
    first = max(length * 3 // 4 // ROWS * ROWS, 0)
    return first, min(first + ROWS, length)


def rows_of(layout: Layout | None, first: int, last: int) -> Layout | None:
    """What a layout keeps in rows ``[first, last)``, over the keys ``[0, last)``."""
    if layout is None:
        return None
    if isinstance(layout, KeySelection):
        blocks = slice(first // layout.block_size, -(-last // layout.block_size))
        index = layout.index[:, :, blocks]
        limit = None if layout.limit is None else layout.limit[:, first:last]
        return KeySelection(torch.where(index < last, index, -1), layout.block_size, limit)
    if isinstance(layout, Groups):
        raise UnsupportedError(
            "the search confirms block masks and key lists; a pattern that gives Groups cannot be an option yet."
        )
    q_block, kv_block = layout.BLOCK_SIZE
    if first % q_block:
        raise UnsupportedError(
            f"an option has query blocks of {q_block} rows; expected a divisor of {ROWS}, so that confirmed rows begin a block."
        )
    kinds = block_mask_kinds(layout)[:, :, first // q_block : -(-last // q_block), : -(-last // kv_block)]
    mod = layout.mask_mod
    return block_mask(
        kinds, (q_block, kv_block), (last - first, last), lambda b, h, q, k: mod(b, h, q + first, k), transpose=False
    )


@dataclass(frozen=True)
class _Fixed(Pattern):
    """A layout decided beforehand, for the confirmed rows."""

    layout: Any = None

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        return self.layout, state


def shortlist(trials: Sequence[Trial], count: int = 2) -> list[int]:
    """The options worth confirming: faster than dense, not beaten in both time and error, most seconds saved per error."""
    dense = trials[0]
    faster = [t for t in trials[1:] if t.seconds < dense.seconds]
    front = [t for t in faster if not any(o.seconds < t.seconds and o.error < t.error for o in faster)]
    front.sort(key=lambda t: (dense.seconds - t.seconds) / max(t.error, 1e-12), reverse=True)
    return [t.option for t in front[:count]]


class Confirmer:
    """Step 2: KL of the logits when one layer changes, over a block of rows behind a dense prefix."""

    def __init__(self, meter: Meter, ids: Tensor) -> None:
        self.meter = meter
        first, last = confirmed_rows(ids.shape[1])
        self.rows = ids[:, first:last]
        self._prefix = None  # a text of a few hundred tokens has its confirmed rows at the beginning
        if first:
            with meter.under(None):
                self._prefix = meter.forward(ids[:, :first], 1, use_cache=True)[0].past_key_values
        self._dense = torch.log_softmax(self._logits(Policy.uniform(Dense())), -1)

    def _logits(self, policy: Policy) -> Tensor:
        with self.meter.under(policy):
            cache = copy.deepcopy(self._prefix)
            out = self.meter.model(input_ids=self.rows.to(self.meter.device), past_key_values=cache, use_cache=True)
        return out.logits[0].float()

    def kl(self, layer: int, kept: Layout | None) -> float:
        """Mean KL(dense ‖ changed), nats per token, when ``layer`` keeps ``kept`` (see :func:`rows_of`)."""
        log_q = torch.log_softmax(self._logits(Policy(layers=((layer, Rule(_Fixed(kept))),))), -1)
        return max(float((self._dense.exp() * (self._dense - log_q)).sum(-1).mean()), 0.0)


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
    """All four steps over the search text ``ids`` ``(1, N)``.

    Args:
        options: patterns; the first is dense.
        max_increase: largest relative increase of perplexity.
        journal: finished steps are read from and written to it.
        decode_of: the pattern to decode with after prefilling with one (None: the same).
        tick: called with a line after each finished unit of work.
    """
    open_layers = "search.scores" not in journal or any(
        f"search.kl.{i}" not in journal for i in range(len(journal["search.scores"]["trials"]))
    )
    kept: list[list[Layout | None]] = []
    if open_layers:
        found, kept = score_layers(meter, ids, options, lambda: tick("scoring layers"))
        if "search.scores" not in journal:
            journal.put("search.scores", {"trials": [[vars(t) for t in row] for row in found]})
    trials = [[Trial(**t) for t in row] for row in journal["search.scores"]["trials"]]
    confirmer = Confirmer(meter, ids) if open_layers else None
    for layer, row in enumerate(trials):
        key = f"search.kl.{layer}"
        if key not in journal:
            assert confirmer is not None
            journal.put(key, {"kl": {str(o): confirmer.kl(layer, kept[layer][o]) for o in shortlist(row)}})
        for option, kl in journal[key]["kl"].items():
            row[int(option)].kl = kl
        tick(f"confirming layer {layer}")
    del confirmer, kept
    return _assemble(meter, ids, options, trials, max_increase, journal, decode_of, tick)


def _assemble(meter: Meter, ids: Tensor, options: Sequence[Pattern], trials: list[list[Trial]], max_increase: float, journal: Journal, decode_of: Callable[[Pattern], Pattern | None], tick: Callable[[str], None]) -> tuple[Found, Policy]:  # fmt: skip
    """Steps 3 and 4."""
    if "search.dense" not in journal:
        dense = meter.quality(ids, None)
        journal.put("search.dense", {"nll": float(dense.nll.mean())})
    dense_nll = journal["search.dense"]["nll"]
    allowed = math.log1p(max_increase)
    limit, lowest_bad = allowed, math.inf
    best: tuple[float, list[int]] = (sum(row[0].seconds for row in trials), [0] * len(trials))
    found = Found(list(options), trials, best[1])
    tried: dict[tuple[int, ...], float] = {tuple(best[1]): 0.0}
    for _ in range(ROUNDS):
        picked = choose(trials, limit)
        if tuple(picked) not in tried:
            key = "search.whole." + "-".join(map(str, picked))
            if key not in journal:
                got = meter.quality(ids, _policy(options, picked, decode_of), what="the searched policy")
                journal.put(key, {"increase": math.expm1(float(got.nll.mean()) - dense_nll)})
            tried[tuple(picked)] = journal[key]["increase"]
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


__all__ = ["Confirmer", "Found", "Trial", "choose", "score_layers", "search", "shortlist"]
