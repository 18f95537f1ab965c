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
        count = self.weight.shape[-1]
        peak = weights.amax((1, 2))
        for g in (peak > self.weight[block.b, block.heads, -1]).nonzero().flatten().tolist():
            head = block.heads.start + g
            flat = weights[g].reshape(-1)
            found = flat.topk(min(count, flat.numel()))
            row, column = found.indices // weights.shape[-1], found.indices % weights.shape[-1]
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
            hidden = first | (block.away.abs() < self.distance)
            state.offer(block, site, block.weights.masked_fill(hidden, 0.0), 0)
            return
        edge = min(max(block.first - self.distance + 1 - block.keys.start, skip), width)
        if edge > skip:  # far enough from every row of the block
            state.offer(block, site, block.weights[..., skip:edge], skip)
        if edge < width:
            tail = block.weights[..., edge:].masked_fill(block.away[:, edge:].abs() < self.distance, 0.0)
            state.offer(block, site, tail, edge)

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
