"""The block-sparse families: random scores per key head, and every query block keeps the best of its key blocks.

The ratio is what is *kept*. Scores are random because the benchmark asks about speed: such a mask says nothing about quality.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core.base_mask import FULL, PARTIAL, BaseMask
from ..core.errors import ConfigError
from ..core.layouts import BlockMask, block_mask
from .masks import Draw, Mask, family
from .masks_static import BLOCK
from .slices import Slice

SHORTEST = 128
"""Tokens of a block of variable size, at least."""


@dataclass(frozen=True, eq=False)
class Blocks(Mask):
    """A mask of blocks.

    Attributes:
        length: T. row_sizes, col_sizes: tokens of the query and key blocks, each summing to T.
        kept: ``(Hkv, query blocks, key blocks)`` bool.
    """

    random = True
    length: int
    row_sizes: Tensor
    col_sizes: Tensor
    kept: Tensor

    @property
    def heads(self) -> int:
        return self.kept.shape[0]

    def area(self) -> int:
        return int((self.kept * self.row_sizes[:, None] * self.col_sizes).sum())

    @cached_property
    def row_of(self) -> Tensor:
        """``(T,)`` query block of every token."""
        return torch.repeat_interleave(torch.arange(self.row_sizes.numel()), self.row_sizes)

    @cached_property
    def col_of(self) -> Tensor:
        """``(T,)`` key block of every token."""
        return torch.repeat_interleave(torch.arange(self.col_sizes.numel()), self.col_sizes)

    def allow(self, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The definition: may query ``i`` see key ``j`` under key head ``h``? Elementwise."""
        return self.kept[h, self.row_of[i], self.col_of[j]]

    def pairs(self, rows: Tensor) -> Tensor:
        """``(Hkv, rows, T)`` bool."""
        kept, row_of, col_of = (x.to(rows.device) for x in (self.kept, self.row_of, self.col_of))
        return kept[:, row_of[rows]][:, :, col_of]

    def slices(self) -> list[list[Slice]]:
        """One full slice for every kept block."""
        rows, cols = (torch.nn.functional.pad(s.cumsum(0), (1, 0)).tolist() for s in (self.row_sizes, self.col_sizes))
        return [
            [Slice((rows[u], rows[u + 1]), (cols[c], cols[c + 1]), "full") for u, c in one.nonzero().tolist()]
            for one in self.kept
        ]

    def facts(self) -> dict[str, Any]:
        return {"kept": round(self.area() / (self.heads * self.length**2), 4), "query_blocks": self.row_sizes.numel()}


@family(13, "uniform_block_sparse", "UBS")
@dataclass(frozen=True, eq=False)
class UniformBlocks(Blocks):
    """Blocks of one size; the last one is shorter where T is no multiple."""

    block: int

    @classmethod
    def draw(cls, draw: Draw, *, block: int = 128, keep: float = 0.5) -> UniformBlocks:
        """Keep ``⌊keep · blocks⌋`` key blocks (at least one) for each query block."""
        whole, rest = divmod(draw.length, block)
        sizes = torch.tensor([block] * whole + [rest] * (rest > 0))
        return cls(draw.length, sizes, sizes, _top(draw, sizes.numel(), sizes.numel(), keep), block)

    def layout(self, num_heads: int, device: torch.device | str = "cpu") -> tuple[BlockMask | None, BaseMask]:
        """Whole tiles, one set for each query head."""
        kinds = self.kept.repeat_interleave(num_heads // self.heads, 0)[None].to(device, torch.int8) * FULL
        lengths = (self.length, self.length)
        return block_mask(kinds, (self.block, self.block), lengths), BaseMask.build(
            *lengths, causal=False, device=device
        )


@family(14, "variable_block_sparse", "VBS")
@dataclass(frozen=True, eq=False)
class VariableBlocks(Blocks):
    """Blocks of random sizes, at least 128 tokens and ``mean_block`` on average, other ones for queries than for keys."""

    @classmethod
    def draw(cls, draw: Draw, *, mean_block: int = 256, keep: float = 0.5) -> VariableBlocks:
        """Raises :class:`ConfigError` for sequences shorter than one block of 128."""
        rows, cols = _sizes(draw, mean_block), _sizes(draw, mean_block)
        return cls(draw.length, rows, cols, _top(draw, rows.numel(), cols.numel(), keep))

    def layout(self, num_heads: int, device: torch.device | str = "cpu") -> tuple[BlockMask | None, BaseMask]:
        """Tiles of 128; those that block edges cut are decided pair by pair."""
        t, (first, last) = self.length, _tile_ends(self.length)
        kept = self.kept.repeat_interleave(num_heads // self.heads, 0)
        sums = torch.nn.functional.pad(kept.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
        top, bottom = self.row_of[first], self.row_of[last] + 1
        left, right = self.col_of[first], self.col_of[last] + 1
        count = (
            sums[:, bottom][:, :, right]
            - sums[:, top][:, :, right]
            - sums[:, bottom][:, :, left]
            + sums[:, top][:, :, left]
        )
        kinds = (count > 0).to(torch.int8) * PARTIAL
        kinds[count == (bottom - top)[:, None] * (right - left)] = FULL
        kept, row_of, col_of = (x.to(device) for x in (kept, self.row_of, self.col_of))

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return kept[h, row_of[i], col_of[j]]

        mask = block_mask(kinds[None].to(device), (BLOCK, BLOCK), (t, t), seen)
        return mask, BaseMask.build(t, t, causal=False, device=device)


def _top(draw: Draw, rows: int, cols: int, keep: float) -> Tensor:
    """``(Hkv, rows, cols)`` bool: the best ``⌊keep · cols⌋`` of random scores in every row, at least one."""
    scores = torch.rand(draw.kv_heads, rows, cols, generator=draw.make)
    best = scores.topk(max(1, int(keep * cols + 1e-9)), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def _sizes(draw: Draw, mean: int) -> Tensor:
    """Block sizes of at least 128 that sum to T: about T / mean blocks, what exceeds 128 shared out at random."""
    if draw.length < SHORTEST:
        raise ConfigError(
            f"mask variable_block_sparse has blocks of at least {SHORTEST} tokens; the length is {draw.length}."
        )
    count = max(1, min(round(draw.length / mean), draw.length // SHORTEST))
    spare = draw.length - count * SHORTEST
    cuts = torch.randint(0, spare + 1, (count - 1,), generator=draw.make).sort().values
    edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([spare])])
    return edges.diff() + SHORTEST


def _tile_ends(length: int) -> tuple[Tensor, Tensor]:
    """First and last token of every tile."""
    first = torch.arange(0, length, BLOCK)
    return first, (first + BLOCK - 1).clamp(max=length - 1)
