"""The heaviest pairs of every head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.registry import register
from ..blocks import Block
from ..probe import Probe, Result, Site, whole


@dataclass
class Best:
    """The best pairs so far: weight ``(B, H, count)``, −1 where there is none yet, with query and key."""

    weight: Tensor
    query: Tensor
    key: Tensor

    @classmethod
    def of(cls, site: Site, count: int) -> Best:
        return cls(site.zeros(count) - 1, *(site.zeros(count, dtype=torch.long) - 1 for _ in range(2)))

    def offer(self, block: Block, site: Site, weights: Tensor, skip: int) -> None:
        """Take what is better from ``(G, R, K′)`` weights of the block's keys from ``skip`` on."""
        for g in range(weights.shape[0]):
            self.offer_rows(block, site, g, None, weights[g], skip)

    def offer_rows(self, block: Block, site: Site, g: int, rows: Tensor | None, weights: Tensor, skip: int) -> None:
        """The same for one query head of the block, with ``weights (R′, K′)`` of the rows ``(R′,)`` of the block, or of all."""
        count, head = self.weight.shape[-1], block.heads.start + g
        if not weights.numel():
            return
        tops = weights.amax(1)
        if not bool(tops.max() > self.weight[block.b, head, -1]):
            return
        best = tops.topk(min(count, len(tops))).indices  # the largest weights are in the rows whose largest are
        flat = weights.index_select(0, best).reshape(-1)
        found = flat.topk(min(count, flat.numel()))
        row, column = best[found.indices // weights.shape[-1]], found.indices % weights.shape[-1]
        row = row if rows is None else rows[row]
        weight = torch.cat([self.weight[block.b, head], found.values])
        query = torch.cat([self.query[block.b, head], site.start + block.rows.start + row])
        key = torch.cat([self.key[block.b, head], site.first_key + block.keys.start + skip + column])
        order = torch.sort(weight, descending=True, stable=True).indices[:count]
        self.weight[block.b, head], self.query[block.b, head], self.key[block.b, head] = (
            x[order] for x in (weight, query, key)
        )

    def results(self) -> dict[str, Result]:
        none = self.weight <= 0
        return {
            "weight": Result(self.weight.masked_fill(none, torch.nan), ("edge",)),
            "query": Result(self.query.masked_fill(none, -1), ("edge",)),
            "key": Result(self.key.masked_fill(none, -1), ("edge",)),
        }


@register("probe", "edges")
@dataclass(frozen=True)
class TopEdges(Probe):
    """The ``count`` largest weights of every head: ``edges.weight``, ``edges.query`` and ``edges.key``, ``(layer, head, edge)``.

    Attributes:
        count: pairs per head, heaviest first.
        sinks: leave out the first tokens of the sequence as keys, which most heads put weight on.
        distance: leave out pairs closer than this; 1 leaves out a token's weight on itself.
    """

    count: int = 32
    sinks: int = 1
    distance: int = 1

    def __post_init__(self) -> None:
        whole("count", self.count, 1)
        whole("sinks", self.sinks, 0)
        whole("distance", self.distance, 0)

    def start(self, site: Site) -> Best:
        return Best.of(site, self.count)

    def see(self, block: Block, site: Site, state: Best) -> None:
        width = block.weights.shape[-1]
        skip = _sinks_before(block, self.sinks)
        if skip is None:  # padding and packed documents: sinks are anywhere
            rank = block.call.base.rank
            first = rank[block.b % rank.shape[0], block.keys] < self.sinks
            hidden = first | (block.between.abs() < self.distance)
            state.offer(block, site, block.weights.masked_fill(hidden, 0.0), 0)
            return
        edge = min(max(block.first - self.distance + 1 - block.keys.start, skip), width)
        most = self._most(block, skip)
        for g in range(len(most)):
            better = most[g] > state.weight[block.b, block.heads.start + g, -1]
            rows = None if bool(better.all()) else better.nonzero()[:, 0]
            weights = block.weights[g] if rows is None else block.weights[g].index_select(0, rows)
            # up to `edge` all keys are far enough from every row of the block
            state.offer_rows(block, site, g, rows, weights[:, skip:edge], skip)
            if edge < width:
                own = block.own if rows is None else block.own[rows]
                near = (own[:, None] - block.position[edge:]).abs() < self.distance
                tail = weights[:, edge:].masked_fill(near, 0.0)
                state.offer_rows(block, site, g, rows, tail, edge)

    def _most(self, block: Block, skip: int) -> Tensor:
        """``(G, R)``: no pair of a row weighs more: its largest weight, or what the keys that are left out leave."""
        largest = torch.exp(-block.offset)
        left = block.on_keys - block.weights[..., :skip].sum(-1)
        own = block.first - block.keys.start
        if self.distance and skip <= own <= block.weights.shape[-1] - len(block.own):
            left = left - block.weights.diagonal(own, 1, 2)
        return (torch.minimum(largest, left) + 1e-5) * block.real

    def finish(self, site: Site, state: Best) -> dict[str, Result]:
        return state.results()


def _sinks_before(block: Block, sinks: int) -> int | None:
    """How many of the block's first keys are sinks, or None when that is not where the sinks are."""
    base = block.call.base
    if base.valid is not None:
        return None
    memo = ("lens_ranks_rise",)
    if memo not in base.cache:
        base.cache[memo] = base.rank.shape[0] == 1 and bool((base.rank[0].diff() == 1).all())
    if not base.cache[memo]:
        return None
    return min(max(sinks - int(base.rank[0, block.keys.start]), 0), block.weights.shape[-1])
