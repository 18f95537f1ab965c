"""How much later tokens look at a token: FAI (arXiv 2510.13554), and the sink score, which is the same mean over all later rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...core.registry import register
from ..blocks import Block
from ..probe import KeyProbe, Site, whole

SHARED = 1 << 17
"""Pairs of a horizon that layers share; larger ones, of the few high blocks where a text begins, are made anew."""


@register("probe", "influence")
@dataclass(frozen=True)
class Influence(KeyProbe):
    """``FAI[s] = mean of w_ts over rows t with s + near ≤ t ≤ s + far``, ``(layer, head, token)``; 0 where there is no such row.

    Attributes:
        near, far: the horizon in tokens; far None is the end of the text. The paper uses 10 and 50 in training, 10 and None in
            its analysis.
        start_row: first row that counts, the first token of the response.
    """

    near: int = 10
    far: int | None = None
    start_row: int = 0

    def __post_init__(self) -> None:
        whole("near", self.near, 0)
        whole("start_row", self.start_row, 0)
        if self.far is not None:
            whole("far", self.far, 0)
            if self.far < self.near:
                raise ConfigError(f"far is {self.far} and near is {self.near}; expected near ≤ far.")

    def measure(self, block: Block, site: Site) -> tuple[Tensor, int]:
        keys = block.keys
        skipped = max(0, self.start_row - site.first_key - block.first)
        first, last = block.first + skipped, block.last
        if first > last:
            return block.weights.new_zeros(block.weights.shape[0], 0), 0
        # keys up to `whole_end` are inside the horizon of every row, those before `begin` of none
        begin = 0 if self.far is None else max(0, first - self.far - keys.start)
        whole_begin = 0 if self.far is None else max(begin, last - self.far - keys.start)
        end = max(0, min(last - self.near + 1, keys.stop) - keys.start)
        whole_end = min(max(first - self.near + 1 - keys.start, 0), end)
        if whole_begin >= whole_end:
            whole_begin = whole_end = begin
        out = block.weights.new_zeros(block.weights.shape[0], max(end - begin, 0))
        weights = block.weights[:, skipped:]
        for a, b, cut in ((begin, whole_begin, True), (whole_begin, whole_end, False), (whole_end, end, True)):
            if a >= b:
                continue
            if cut:
                sums = (weights[..., a:b] * self._inside(block, weights.shape[1], b - a, first - keys.start - a)).sum(1)
            elif skipped or b - a < weights.shape[-1] // 2:
                sums = weights[..., a:b].sum(1)
            else:  # nearly all of the block: sums that several probes share
                sums = block.received[:, a:b]
            out[:, a - begin : b - begin] = sums
        return out, begin

    def _inside(self, block: Block, rows: int, keys: int, ahead: int) -> Tensor:
        """``(rows, keys)`` 1 inside the horizon; the first row's own key is ``ahead`` keys after the first key. Layers share these."""
        cache = block.call.base.cache
        memo = ("lens_horizon", rows, keys, ahead, self.near, self.far, block.weights.dtype)
        inside = cache.get(memo)
        if inside is None:
            inside = block.weights.new_ones(rows, keys).tril_(ahead - self.near)
            inside = inside if self.far is None else inside.triu_(ahead - self.far)
            if inside.numel() <= SHARED:
                cache[memo] = inside
        return inside

    def scale(self, site: Site) -> Tensor:
        """One over the number of rows in the horizon that are real."""
        rows = site.is_real().clone()
        rows[:, : max(self.start_row, site.first)] = False
        before = torch.nn.functional.pad(rows.long().cumsum(-1), (1, 0))  # rows below an index
        at = torch.arange(site.end, device=site.device)
        low = (at + self.near).clamp(max=site.end)
        high = torch.full_like(at, site.end) if self.far is None else (at + self.far + 1).clamp(max=site.end)
        count = (before[:, high] - before[:, low]).to(site.dtype)[:, None]
        return torch.where(count > 0, 1 / count.clamp(min=1), 0.0)


@register("probe", "sink_score")
@dataclass(frozen=True)
class SinkScore(Influence):
    """``mean_{i > t} w_it``, the attention that a token receives from a later one on average; ``(layer, head, token)``.

    The score by which sinks are told (arXiv 2512.22213 uses it; 0.3 is the usual bound for a first-token sink).
    """

    near: int = 1
