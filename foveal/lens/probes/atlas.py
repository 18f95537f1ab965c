"""A small picture of every head's map."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.registry import register
from ..blocks import Block
from ..probe import Probe, Result, Site, whole

if TYPE_CHECKING:
    from ...hf import AttentionEvent


@dataclass
class Picture:
    """Sums of weights per cell, ``(B, H, n, n)``, and tokens per cell."""

    sums: Tensor
    size: int

    def reach(self, end: int, most: int) -> None:
        """Room for ``end`` tokens with no more than about ``most`` cells a side."""
        while -(-end // self.size) > most:
            n = self.sums.shape[-1]
            even = torch.nn.functional.pad(self.sums, (0, n % 2, 0, n % 2))
            half = (n + 1) // 2
            self.sums = even.unflatten(-1, (half, 2)).sum(-1).unflatten(-2, (half, 2)).sum(-2)
            self.size *= 2
        grow = -(-end // self.size) - self.sums.shape[-1]
        if grow > 0:
            self.sums = torch.nn.functional.pad(self.sums, (0, grow, 0, grow))


@register("probe", "atlas")
@dataclass(frozen=True)
class Atlas(Probe):
    """Weights averaged over cells of tokens: ``(layer, head, query_cell, key_cell)``; a row of cells sums to 1.

    Attributes:
        cells: cells a side for a text that comes in one call; chunks and decode steps may double it, after which two cells join.
    """

    cells: int = 32

    def __post_init__(self) -> None:
        whole("cells", self.cells, 1)

    def start(self, site: Site) -> Picture:
        return Picture(site.zeros(0, 0), max(1, -(-site.end // self.cells)))

    def call(self, event: AttentionEvent, site: Site, state: Picture) -> Picture:
        state.reach(site.end, self.cells if state.sums.numel() == 0 else 2 * self.cells)
        return state

    def see(self, block: Block, site: Site, state: Picture) -> None:
        size = state.size
        top, left = site.start + block.rows.start, site.first_key + block.keys.start
        rows = len(block.own)
        first, last = top // size, (top + rows - 1) // size
        cuts = [0, *((cell + 1) * size - top for cell in range(first, last)), rows]
        parts = (
            [block.weights[:, a:b].sum(1) for a, b in itertools.pairwise(cuts)] if last > first else [block.received]
        )
        sums = torch.stack(parts, 1)
        before = left % size
        sums = (
            torch.nn.functional.pad(sums, (before, -(before + sums.shape[-1]) % size)).unflatten(-1, (-1, size)).sum(-1)
        )
        into = state.sums[block.b, block.heads, first : last + 1]
        into[..., left // size : left // size + sums.shape[-1]] += sums

    def finish(self, site: Site, state: Picture) -> dict[str, Result]:
        rows = site.is_real().to(site.dtype)
        rows[:, : site.first] = 0
        n = state.sums.shape[-1]
        count = torch.nn.functional.pad(rows, (0, n * state.size - site.end)).unflatten(-1, (n, state.size)).sum(-1)
        values = state.sums / count[:, None, :, None].clamp(min=1)
        edges = tuple(i * state.size for i in range(n))
        return {"": Result(values, ("query_cell", "key_cell"), {"query_cell": edges, "key_cell": edges})}
