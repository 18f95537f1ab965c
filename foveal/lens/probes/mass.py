"""Mass on given sets of keys: how much of a row's attention goes to the first tokens, to a span, to chosen tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...core.registry import register
from ..blocks import Block
from ..probe import Probe, Result, Site, inside

if TYPE_CHECKING:
    from ...hf import AttentionEvent


FEW = 16
"""Keys that are faster picked one by one than in a product with all."""


@register("probe", "mass")
@dataclass(frozen=True)
class Mass(Probe):
    """Share of a row's attention on each set; ``(layer, head, token, set)``.

    Attributes:
        sets: token positions by the set's name, counted from the first real token of the sequence (after left padding, and inside
            a packed document). Default: the first token, whose mean is F-Attn of arXiv 2505.06708.
    """

    sets: Mapping[str, Sequence[int]] = field(default_factory=lambda: {"first": (0,)})

    def __post_init__(self) -> None:
        if not self.sets:
            raise ConfigError("Mass.sets is empty; expected token positions by name, such as {'first': [0]}.")
        for name, positions in self.sets.items():
            if not len(positions) or min(positions) < 0:
                raise ConfigError(
                    f"Mass.sets[{name!r}] is {list(positions)[:4]}; expected one or more positions from 0."
                )

    def start(self, site: Site) -> list[Tensor]:
        return []

    def call(self, event: AttentionEvent, site: Site, state: list[Tensor]) -> list[Tensor]:
        state.append(site.zeros(site.end - site.seen, len(self.sets)))
        return state

    def see(self, block: Block, site: Site, state: list[Tensor]) -> None:
        for i, positions in enumerate(self.sets.values()):
            few, chosen = self._members(block, tuple(positions))
            if few is None:
                sums = block.dot(chosen[block.keys])
            else:
                columns = [at - block.keys.start for at in few if block.keys.start <= at < block.keys.stop]
                sums = block.weights[..., columns].sum(-1)
            state[-1][block.b, block.heads, block.rows, i] = sums

    def _members(self, block: Block, positions: tuple[int, ...]) -> tuple[list[int] | None, Tensor]:
        """The set's key indices where they are few, and ``(Nk,)`` 1 on the set; remembered with the mask, since layers share it."""
        base, line = block.call.base, block.b % block.call.base.rank.shape[0]
        memo = ("lens_set", positions, line)
        if memo not in base.cache:
            inside = torch.isin(base.rank[line], torch.tensor(positions, device=base.device))
            few = inside.nonzero()[:, 0].tolist() if int(inside.sum()) <= FEW else None
            base.cache[memo] = few, inside.to(block.weights.dtype)
        return base.cache[memo]

    def finish(self, site: Site, state: list[Tensor]) -> dict[str, Result]:
        for name, positions in self.sets.items():
            inside(f"Mass.sets[{name!r}]", tuple(positions), site.end)
        values = torch.cat([site.zeros(site.first, len(self.sets)), *state], 2)
        values[:, :, : site.first] = torch.nan
        values = values.masked_fill(~site.is_real()[:, None, :, None], torch.nan)
        return {"": Result(values, ("token", "set"), {"set": tuple(self.sets)})}
