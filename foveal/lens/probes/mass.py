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
            chosen = self._indicator(block, tuple(positions))
            state[-1][block.b, block.heads, block.rows, i] = block.dot(chosen[block.keys])

    def _indicator(self, block: Block, positions: tuple[int, ...]) -> Tensor:
        """``(Nk,)`` 1 on the set; remembered with the mask, since layers share it."""
        base, line = block.call.base, block.b % block.call.base.rank.shape[0]
        memo = ("lens_set", positions, line)
        if memo not in base.cache:
            wanted = torch.tensor(positions, device=base.device)
            base.cache[memo] = torch.isin(base.rank[line], wanted).to(block.weights.dtype)
        return base.cache[memo]

    def finish(self, site: Site, state: list[Tensor]) -> dict[str, Result]:
        for name, positions in self.sets.items():
            inside(f"Mass.sets[{name!r}]", tuple(positions), site.end)
        values = torch.cat([site.zeros(site.first, len(self.sets)), *state], 2)
        values[:, :, : site.first] = torch.nan
        values = values.masked_fill(~site.is_real()[:, None, :, None], torch.nan)
        return {"": Result(values, ("token", "set"), {"set": tuple(self.sets)})}
