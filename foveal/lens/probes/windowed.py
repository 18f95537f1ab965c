"""WAAD: how far a row looks back inside a short window (arXiv 2510.13554)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.registry import register
from ..blocks import Block
from ..probe import RowProbe, Site, whole


@register("probe", "windowed_distance")
@dataclass(frozen=True)
class WindowedDistance(RowProbe):
    """``Σ_s p_ts min(|t − s|, window)`` over the weights given a key, in [0, window]; ``(layer, head, token)``.

    Keys further away than the window count alike, so only the band near the diagonal is looked at.
    """

    window: int = 10

    def __post_init__(self) -> None:
        whole("window", self.window, 1)

    def measure(self, block: Block, site: Site) -> Tensor:
        back, ahead = self.window - 1, 0 if block.call.base.causal else self.window - 1
        rows, width, first = len(block.own), block.weights.shape[-1], block.first - block.keys.start
        begin = min(max(back - first, 0), rows)  # from here to `end` all keys of a row's window are keys of the block
        end = max(min(width - ahead - first, rows), begin)
        parts = [self._near(block, 0, begin), self._band(block, begin, end, back, ahead), self._near(block, end, rows)]
        return (self.window - torch.cat(parts, -1) / block.on_keys) * block.real

    def _band(self, block: Block, begin: int, end: int, back: int, ahead: int) -> Tensor:
        """``(G, end − begin)`` sums of weight times ``window − distance`` over the diagonals inside the window."""
        groups, rows, width = block.weights.shape
        gap = self.window - torch.arange(-back, ahead + 1, device=block.weights.device).abs().to(block.weights.dtype)
        if begin == end:
            return block.weights.new_zeros(groups, 0)
        start = block.weights.storage_offset() + begin * width + block.first - block.keys.start + begin - back
        band = block.weights.as_strided((groups, end - begin, len(gap)), (rows * width, width + 1, 1), start)
        return band @ gap

    def _near(self, block: Block, begin: int, end: int) -> Tensor:
        """The same for rows at the block's edges, pair by pair."""
        start, width = block.keys.start, block.weights.shape[-1]
        low = min(max(block.first + begin - self.window + 1 - start, 0), width)
        high = min(max(block.first + end - 1 + self.window - start, low), width)
        away = block.own[begin:end, None] - block.position[low:high]
        gap = (self.window - away.abs()).clamp(min=0).to(block.weights.dtype)
        return (block.weights[:, begin:end, low:high] * gap).sum(-1)
