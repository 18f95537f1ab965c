"""What every key receives: the column sums of the weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...core.registry import register
from ..blocks import Block
from ..probe import KeyProbe, Site


@register("probe", "received")
@dataclass(frozen=True)
class Received(KeyProbe):
    """``Σ_i w_is`` over all rows, ``(layer, head, token)``; sums to the number of rows (less what a learned sink takes)."""

    def measure(self, block: Block, site: Site) -> tuple[Tensor, int]:
        return block.received, 0
