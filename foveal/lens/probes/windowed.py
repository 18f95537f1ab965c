"""WAAD: how far a row looks back inside a short window (arXiv 2510.13554)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core.registry import register
from ..blocks import Block
from ..probe import RowProbe, Site, whole


@register("probe", "windowed_distance")
@dataclass(frozen=True)
class WindowedDistance(RowProbe):
    """``Σ_s p_ts min(|t − s|, window)`` over the weights given a key, in [0, window]; ``(layer, head, token)``.

    Keys further away than the window count alike, so only the band near the diagonal is looked at one by one.
    """

    window: int = 10

    def __post_init__(self) -> None:
        whole("window", self.window, 1)

    def measure(self, block: Block, site: Site) -> Tensor:
        start, width = block.keys.start, block.weights.shape[-1]
        low = min(max(block.first - self.window + 1 - start, 0), width)
        high = min(max(block.last + self.window - start, low), width)
        gap = (self.window - block.away[:, low:high].abs()).clamp(min=0).to(block.weights.dtype)
        near = (block.weights[..., low:high] * gap).sum(-1) / block.on_keys
        return (self.window - near) * block.real
