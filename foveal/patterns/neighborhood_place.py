"""Where a neighborhood is used: lengths and order of one call, and where grid tokens lie among its queries and keys."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.grid import Axis
from ..core.tiles import Tiling, product_sum, row_major


@dataclass(frozen=True)
class Place:
    """A neighborhood in one call.

    Attributes:
        axes: of the grid. tilings: orders of queries and keys; None is row-major.
        q_len, kv_len: of the call. first: token number of query row 0. causal: whether the host is.
        extra: keys after the grid. layout: the pattern's wish.
    """

    axes: tuple[Axis, ...]
    tilings: tuple[Tiling, Tiling] | None
    q_len: int
    kv_len: int
    first: int
    causal: bool
    extra: int
    layout: Literal["auto", "blocks", "lists"]

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)

    @property
    def keys(self) -> int:
        """Keys of a window."""
        return math.prod(axis.window for axis in self.axes)

    @property
    def dense(self) -> bool:
        """Every real pair that the host allows is visible, and no slot is padding."""
        if self.tilings and any(t.length != t.tokens for t in self.tilings):
            return False
        one = self.axes[0]
        plain_causal = len(self.axes) == 1 and self.causal and not self.extra and one.window == one.length
        return plain_causal or all(axis.whole for axis in self.axes)

    @property
    def rest(self) -> int | None:
        """Tokens of all axes but the first when these are seen whole and the first is not dilated: windows are then intervals."""
        plain = self.axes[0].dilation == 1 and all(axis.whole for axis in self.axes[1:])
        return math.prod(self.grid[1:]) if plain and self.tilings is None else None


def offsets_of(place: Place, which: int) -> list[Tensor]:
    return row_major(place.grid) if place.tilings is None else place.tilings[which].offsets()


def slots_of(place: Place, which: int) -> Tensor:
    """``(tokens,)``: where the row-major tokens of the grid are among the queries (0) or keys (1), before any is cut off."""
    return product_sum([offset[:, None] for offset in offsets_of(place, which)])[:, 0]


def per_slot(place: Place, which: int, values: list[Tensor], fill: int) -> list[Tensor]:
    """Per axis values of coordinates, spread over all slots of the call; slots that are no grid token get ``fill``."""
    slots, found = slots_of(place, which), []
    length = place.q_len if which == 0 else place.kv_len
    shift = place.first if which == 0 else 0
    size = max(int(slots[-1]) + 1, int(slots.max()) + 1, shift + length)
    for a, value in enumerate(values):
        shape = [1] * len(values)
        shape[a] = -1
        out = torch.full((size,), fill)
        out[slots] = value.view(shape).expand(place.grid).reshape(-1)
        found.append(out[shift : shift + length].clone())
    return found


def extra_slots(place: Place) -> tuple[Tensor, Tensor]:
    """``(q_len,)`` and ``(kv_len,)`` bool: slots outside the grid that see, or are seen by, everything."""
    tokens = (math.prod(place.grid),) * 2 if place.tilings is None else tuple(t.length for t in place.tilings)
    q, k = torch.arange(place.q_len) + place.first, torch.arange(place.kv_len)
    if not place.extra:
        return torch.zeros_like(q, dtype=torch.bool), torch.zeros_like(k, dtype=torch.bool)
    return q >= tokens[0], (k >= tokens[1]) & (k < tokens[1] + place.extra)
