"""Score options layer by layer on the search texts: output error and time of all, KL of the logits of the best.

One dense forward over each text does most of it: at every layer each option attends to the same q, k, v. The two most
promising options of each layer are then confirmed on every text: only that layer changes, for a block of rows in the text's
last third after a dense prefix, and the KL of the logits to the dense model's is measured. The rows keep what the option chose
for them in the whole text, so options that treat the end of a prompt specially gain nothing by it.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, State
from ..core.errors import UnsupportedError
from ..core.layouts import Groups, KeySelection, Layout, block_mask, block_mask_kinds
from ..hf import AttentionEvent
from ..kernels.dispatch import compute
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..policies.policy import Policy, Rule
from .meter import Meter, losses

ROWS = 128
"""Rows whose logits confirm an option, per text."""


@dataclass
class Trial:
    """One option in one layer.

    Attributes:
        option: index into the options. error: ‖out − dense‖² / ‖dense‖² of the layer's attention output, on the first text.
        seconds: one attention call at the full context, selection included; the median over the layers that share the
            model's mask, so that a disturbed clock does not choose between them.
        kl: nats, on the text where it costs most; None when not confirmed.
    """

    option: int
    error: float
    seconds: float
    kl: float | None = None


@dataclass(frozen=True, eq=False)
class Survey:
    """What one dense forward over a search text told.

    Attributes:
        trials: per layer, one trial per option. kept: per layer, what the shortlisted options keep in the confirmed rows.
        nll: mean loss of the scored tokens, nats. rows: ``(1, R)`` tokens that confirm. prefix: the cache before them.
    """

    trials: list[list[Trial]]
    kept: list[dict[int, Layout | None]]
    nll: float
    rows: Tensor
    prefix: Any


def survey(
    meter: Meter,
    ids: Tensor,
    options: Sequence[Pattern],
    trials: list[list[Trial]] | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Survey:
    """One dense forward over ``ids`` ``(1, N)``.

    Args:
        options: patterns; the first is dense.
        trials: scores from another text; None to score every option here.
        tick: called after every layer.
    """
    scored: list[list[Trial]] = []
    kept: list[dict[int, Layout | None]] = []
    masks: list[BaseMask] = []
    first, last = confirmed_rows(ids.shape[1])

    def probe(event: AttentionEvent) -> None:
        if event.role != "self":
            return
        if trials is None:
            row, layouts = _score(meter, event, options)
        else:
            row = trials[len(scored)]
            layouts = {o: _select(event, options[o]) for o in shortlist(row)}
        scored.append(row)
        kept.append({o: rows_of(layout, first, last) for o, layout in layouts.items()})
        masks.append(event.call.base)
        tick()

    count = meter.scored(ids.shape[1])
    with meter.under(Policy.uniform(Dense()), (probe,)):
        out, _ = meter.forward(ids, count + 1, use_cache=True)
    if trials is None:
        _steady(scored, masks)
    nll = losses(out.logits[0, -count - 1 : -1], ids[0, -count:].to(meter.device), "the dense model")
    return Survey(
        scored, kept, float(nll.mean()), ids[:, first:last], _prefix(meter, ids[:, :first], out.past_key_values)
    )


def _steady(scored: Sequence[Sequence[Trial]], masks: Sequence[BaseMask]) -> None:
    """Give every option the median of its times over the layers that share a mask."""
    for mask in {id(m): m for m in masks}.values():
        alike = [row for row, m in zip(scored, masks, strict=True) if m is mask]
        for trials in zip(*alike, strict=True):
            seconds = statistics.median(t.seconds for t in trials)
            for trial in trials:
                trial.seconds = seconds


def _select(event: AttentionEvent, pattern: Pattern) -> Layout | None:
    return pattern.select(event.call.q, event.call.k, event.ctx, None)[0]


def _score(
    meter: Meter, event: AttentionEvent, options: Sequence[Pattern]
) -> tuple[list[Trial], dict[int, Layout | None]]:
    dense, row, layouts = event.out.float(), [], {}
    size = float(dense.square().sum())
    for index, pattern in enumerate(options):
        start = time.perf_counter()
        layout = _select(event, pattern)
        out, _ = compute(event.call.replace(layout=layout), meter.impl, event.sink_logits)
        if out.device.type == "cuda":
            torch.cuda.synchronize(out.device)
        seconds = time.perf_counter() - start
        row.append(Trial(index, float((out.float() - dense).square().sum()) / max(size, 1e-30), seconds))
        layouts[index] = layout
    return row, layouts


def _prefix(meter: Meter, ids: Tensor, cache: Any) -> Any:
    """A cache of ``ids`` ``(1, n)`` alone, from one that goes on; a rolling cache has forgotten it and is filled anew."""
    if not ids.shape[1]:
        return None  # a text of a few hundred tokens has its confirmed rows at the beginning
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        with meter.under(None):
            return meter.forward(ids, 1, use_cache=True)[0].past_key_values
    cache.crop(ids.shape[1] - cache.get_seq_length())
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # a view would be copied whole every time
    return cache


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
    """KL of the logits when one layer changes, over the confirmed rows of one text behind its dense prefix."""

    def __init__(self, meter: Meter, found: Survey) -> None:
        self.meter, self.found = meter, found
        self._dense = torch.log_softmax(self._logits(Policy.uniform(Dense())), -1)

    def _logits(self, policy: Policy) -> Tensor:
        with self.meter.under(policy):
            cache = copy.deepcopy(self.found.prefix)
            rows = self.found.rows.to(self.meter.device)
            out = self.meter.model(input_ids=rows, past_key_values=cache, use_cache=True)
        return out.logits[0].float()

    def kl(self, layer: int, option: int) -> float:
        """Mean KL(dense ‖ changed), nats per token, when ``layer`` keeps what this option of its shortlist keeps."""
        rule = Rule(_Fixed(self.found.kept[layer][option]))
        log_q = torch.log_softmax(self._logits(Policy(layers=((layer, rule),))), -1)
        return max(float((self._dense.exp() * (self._dense - log_q)).sum(-1).mean()), 0.0)
