"""Token order in which the tokens of a multi-dimensional tile are neighbours, so that locality on a grid becomes block sparsity.

GNA (arXiv 2504.16922) calls this token permutation. Every axis is padded to a multiple of ``tile · dilation`` and read as
``(tiles, tile, dilation)``; the new order is dilation groups, then tiles, then the tokens of a tile, each row-major. Queries and keys
may use tiles of different shapes. Token-wise layers do not mind the order: a model may permute once before its first block
and restore once after its last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import ConfigError, ShapeError


@dataclass(frozen=True)
class Tiling:
    """The order of a grid's tokens by tiles.

    Attributes:
        grid: tokens per axis. tile: tokens of a tile per axis. dilation: per axis.

    Raises:
        ConfigError: another number of axes, or a value below 1.
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("tile", "dilation"):
            value = getattr(self, name)
            if len(value) != len(self.grid) or min(value) < 1:
                raise ConfigError(
                    f"Tiling.{name} is {value}; expected {len(self.grid)} numbers of at least 1, one per axis of the grid."
                )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Tiles per axis and dilation group."""
        return tuple(-(-n // (t * d)) for n, t, d in zip(self.grid, self.tile, self.dilation, strict=True))

    @property
    def tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        """Slots of the new order, padding included."""
        return math.prod(self.counts) * math.prod(self.tile) * math.prod(self.dilation)

    @property
    def trivial(self) -> bool:
        """Whether the new order is the old one: a single axis without dilation and padding."""
        return len(self.grid) == 1 and self.dilation == (1,) and self.length == self.tokens

    def offsets(self) -> list[Tensor]:
        """Per axis ``(n,)`` int64: the slot of a token is the sum of the entries of its coordinates."""
        groups, tiles, inside = (_steps(sizes) for sizes in (self.dilation, self.counts, self.tile))
        per_tile = math.prod(self.tile)
        per_group = per_tile * math.prod(self.counts)
        found = []
        for a, (n, t, d) in enumerate(zip(self.grid, self.tile, self.dilation, strict=True)):
            x = torch.arange(n)
            index = torch.div(x, d, rounding_mode="floor")
            found.append(
                (x % d) * groups[a] * per_group
                + torch.div(index, t, rounding_mode="floor") * tiles[a] * per_tile
                + (index % t) * inside[a]
            )
        return found

    def permute(self, x: Tensor, dim: int = -2) -> Tensor:
        """Row-major tokens along ``dim`` (N of them) in the new order; padding slots hold zeros.

        Raises:
            ShapeError: ``x`` does not have N tokens there.
        """
        dim = dim % x.dim()
        if x.shape[dim] != self.tokens:
            raise ShapeError(
                f"x has {x.shape[dim]} tokens in dimension {dim}; expected {self.tokens}, the grid {self.grid}."
            )
        if self.trivial:
            return x
        x = x.unflatten(dim, self.grid)
        extra = [c * t * d - n for c, t, d, n in zip(self.counts, self.tile, self.dilation, self.grid, strict=True)]
        if any(extra):
            after = [0, 0] * (x.dim() - dim - len(self.grid))
            x = torch.nn.functional.pad(x, after + [p for e in reversed(extra) for p in (0, e)])
        for a, part in reversed(list(enumerate(zip(self.counts, self.tile, self.dilation, strict=True)))):
            x = x.unflatten(dim + a, part)
        rank = len(self.grid)
        middle = [dim + 3 * a + which for which in (2, 0, 1) for a in range(rank)]
        x = x.permute(*range(dim), *middle, *range(dim + 3 * rank, x.dim()))
        return x.flatten(dim, dim + 3 * rank - 1)

    def restore(self, x: Tensor, dim: int = -2) -> Tensor:
        """The inverse of ``permute``: row-major tokens, padding dropped.

        Raises:
            ShapeError: ``x`` does not have the new order's length there.
        """
        dim = dim % x.dim()
        if x.shape[dim] != self.length:
            raise ShapeError(
                f"x has {x.shape[dim]} slots in dimension {dim}; expected {self.length}, grid {self.grid} in tiles of "
                f"{self.tile}. Restore queries with the query tile."
            )
        if self.trivial:
            return x
        rank = len(self.grid)
        x = x.unflatten(dim, (*self.dilation, *self.counts, *self.tile))
        middle = [dim + which * rank + a for a in range(rank) for which in (1, 2, 0)]
        x = x.permute(*range(dim), *middle, *range(dim + 3 * rank, x.dim()))
        for a in range(rank):
            x = x.flatten(dim + a, dim + a + 2).narrow(dim + a, 0, self.grid[a])
        return x.flatten(dim, dim + rank - 1)


def _steps(sizes: tuple[int, ...]) -> list[int]:
    return [math.prod(sizes[a + 1 :]) for a in range(len(sizes))]


def product_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sums over a product of axes: ``out[(i_0, i_1, …), (j_0, j_1, …), …] = Σ_a parts[a][i_a, j_a, …]``; −1 where a part is negative.

    Args:
        parts: one tensor per axis, all with equally many dimensions; dimension k of the result has the product of their sizes.
    """
    total, hidden = parts[0], parts[0] < 0
    for part in parts[1:]:
        mine = [n for size in total.shape for n in (size, 1)]
        theirs = [n for size in part.shape for n in (1, size)]
        shape = [n * m for n, m in zip(total.shape, part.shape, strict=True)]
        total = (total.view(mine) + part.view(theirs)).reshape(shape)
        hidden = (hidden.view(mine) | (part < 0).view(theirs)).reshape(shape)
    return torch.where(hidden, -1, total)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``, −1 where the index is negative."""
    return torch.where(index >= 0, values[index.clamp(min=0)], -1)


def row_major(grid: tuple[int, ...]) -> list[Tensor]:
    """``Tiling.offsets`` of the plain order: the token number is the sum of the entries of its coordinates."""
    return [torch.arange(n) * step for n, step in zip(grid, _steps(grid), strict=True)]
