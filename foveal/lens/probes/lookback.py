"""How far a row looks back on average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.registry import register
from ..blocks import Block
from ..probe import RowProbe, Site, whole


@register("probe", "lookback")
@dataclass(frozen=True)
class LookBack(RowProbe):
    """``Σ_s p_ts |t − s|`` in tokens over the weights given a key, ``(layer, head, token)``.

    Under a causal mask its mean over rows is ``d[l, h]``, which arXiv 2510.13554 sorts heads by. ``skip`` leaves out the first
    tokens of the sequence, which draw attention wherever they are (not in the paper).
    """

    skip: int = 0

    def __post_init__(self) -> None:
        whole("skip", self.skip, 0)

    def measure(self, block: Block, site: Site) -> Tensor:
        mass = block.on_keys * block.real
        if not self.skip:
            return block.distance / mass.clamp(min=1e-30)
        base, dtype = block.call.base, block.weights.dtype
        keep = (base.rank[block.b % base.rank.shape[0], block.keys] >= self.skip).to(dtype)
        mass = block.dot(keep)
        if base.causal:  # counted from the block's first row, so that small distances stay exact
            total = block.dot((block.first - block.position).to(dtype) * keep) + (block.own - block.first) * mass
        else:
            total = torch.linalg.vecdot(block.weights, (block.between.abs() * keep)[None])
        return total / mass.clamp(min=1e-30)
