"""Complete rows of the weights, for a few chosen tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...core.registry import register
from ..blocks import Block
from ..probe import Probe, Result, Site, inside

if TYPE_CHECKING:
    from ...hf import AttentionEvent


@register("probe", "rows")
@dataclass(frozen=True)
class ChosenRows(Probe):
    """The weights of the tokens at ``positions`` on every token: ``(layer, head, row, token)``.

    Attributes:
        positions: in the text as given, padding counted, from 0. At most a few hundred: each costs N numbers per head.
    """

    positions: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(self.positions))
        if not self.positions or min(self.positions) < 0:
            raise ConfigError(
                f"ChosenRows.positions is {list(self.positions)[:4]}; expected one or more positions from 0."
            )

    def start(self, site: Site) -> dict[int, Tensor]:
        return {}

    def call(self, event: AttentionEvent, site: Site, state: dict[int, Tensor]) -> dict[int, Tensor]:
        for at in self.positions:
            if site.start <= at < site.end:
                state[at] = site.zeros(site.end)
        return state

    def see(self, block: Block, site: Site, state: dict[int, Tensor]) -> None:
        first = site.start + block.rows.start
        for at in self.positions:
            if 0 <= at - first < len(block.own):
                keys = slice(site.first_key + block.keys.start, site.first_key + block.keys.stop)
                state[at][block.b, block.heads, keys] = block.weights[:, at - first]

    def finish(self, site: Site, state: dict[int, Tensor]) -> dict[str, Result]:
        inside("ChosenRows.positions", self.positions, site.end)
        missing = [at for at in self.positions if at not in state]
        if missing:
            raise ConfigError(
                f"ChosenRows.positions asks for position {missing[0]}, which was in the cache before the recording began at {site.first}."
            )
        rows = [torch.nn.functional.pad(state[at], (0, site.end - state[at].shape[-1])) for at in self.positions]
        return {"": Result(torch.stack(rows, 2), ("row", "token"), {"row": self.positions})}
