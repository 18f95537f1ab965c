"""Entropy of every row's distribution over keys, in nats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.registry import register
from ..blocks import Block
from ..probe import RowProbe, Site


@register("probe", "entropy")
@dataclass(frozen=True)
class Entropy(RowProbe):
    """``−Σ p log p`` with ``p`` the weights given that a key, and no learned sink, is attended to; ``(layer, head, token)``.

    From the sum of ``w·log w`` over the block: with logits counted from the row's largest, no term cancels another.
    """

    def measure(self, block: Block, site: Site) -> Tensor:
        surprise = -block.spread / block.on_keys
        return torch.where(block.real, surprise + block.offset + block.on_keys.log(), 0.0).clamp_(min=0)
