"""What a sparse policy drops: the dense attention that lies on pairs which it does not keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.registry import register
from ..blocks import Block
from ..probe import Probe, Result, Site, whole
from .edges import Best

if TYPE_CHECKING:
    from ...hf import AttentionEvent


@dataclass
class _State:
    mass: list[Tensor]
    best: Best


@register("probe", "lost")
@dataclass(frozen=True)
class Lost(Probe):
    """``lost.mass``: the share of a row's dense attention that the policy drops, ``(layer, head, token)``; and the heaviest dropped
    pairs, ``lost.weight``, ``lost.query`` and ``lost.key``, ``(layer, head, edge)``.

    Dense means: by the same queries and keys. What earlier layers lost has changed those already.

    Attributes:
        count: pairs per head.
    """

    needs_policy = True
    count: int = 16

    def __post_init__(self) -> None:
        whole("count", self.count, 1)

    def start(self, site: Site) -> _State:
        return _State([], Best.of(site, self.count))

    def call(self, event: AttentionEvent, site: Site, state: _State) -> _State:
        state.mass.append(site.zeros(site.end - site.seen))
        return state

    def see(self, block: Block, site: Site, state: _State) -> None:
        kept = block.kept
        if kept is None:
            return
        dropped = block.weights.masked_fill(kept, 0.0)
        state.mass[-1][block.b, block.heads, block.rows] = dropped.sum(-1)
        state.best.offer(block, site, dropped, 0)

    def finish(self, site: Site, state: _State) -> dict[str, Result]:
        values = torch.cat([site.zeros(site.first), *state.mass], -1)
        values[..., : site.first] = torch.nan
        mass = values.masked_fill(~site.is_real()[:, None], torch.nan)
        return {"mass": Result(mass), **state.best.results()}
