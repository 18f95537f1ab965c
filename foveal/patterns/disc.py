"""Discs on an image with text tokens (CLEAR, arXiv 2412.16112): an image token sees the text and a disc around itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, State
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..core.layouts import Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from .base import Pattern
from .near import BLOCK, Places, near_layout, rows_of

TRAINED_TOKENS = 64 * 64 + 512
"""Image and text tokens of the model that CLEAR converts, at the resolution it was trained on."""


@register("pattern", "disc")
@dataclass(frozen=True)
class Disc(Pattern):
    """Each image token sees all text tokens and the image tokens less than ``radius`` away; text sees everything.

    Attributes:
        radius: a key is visible when ``(y_q − y_k)² + (x_q − x_k)² < radius²``, strictly. 1 leaves the token itself.
        grid: ``(height, width)`` in tokens. The height may be −1: it follows the length, and the last row may be incomplete. None takes
            the grid of the context.
        text: tokens before the image; they see everything and everything sees them.
        tile: ``(height, width)`` of tiles whose tokens are neighbours in the sequence (see ``order``), so that a disc touches few
            blocks. None is row-major.

    Discs are cut at the image's borders, never shifted, so the mask is symmetric. Places count from key 0; the model's own mask
    (padding, causality) only hides. Source: CLEAR, section 3; the strict comparison is the authors' code.
    """

    radius: int
    grid: tuple[int, int] | None = None
    text: int = 0
    tile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "radius", low=1)
        check_range(self, "text", low=0)
        if self.grid is not None:
            self._check_grid(self.grid)
        if self.tile is not None and min(self.tile) < 1:
            raise ConfigError(f"Disc.tile is {self.tile!r}; expected two numbers of at least 1.")

    def _check_grid(self, grid: tuple[int, int]) -> None:
        if len(grid) != 2 or grid[1] < 1 or (grid[0] < 1 and grid[0] != -1):
            raise ConfigError(
                f"Disc.grid is {grid!r}; expected (height, width) of at least 1 each, the height perhaps −1."
            )
        if self.tile is not None and (grid[0] == -1 or grid[0] % self.tile[0] or grid[1] % self.tile[1]):
            raise ConfigError(
                f"Disc.tile is {self.tile!r} on the grid {grid!r}; expected a height and a width that divide the grid's. "
                "Pad the image, or use tile=None."
            )

    @property
    def static(self) -> bool:
        return True

    @property
    def block(self) -> int:
        """Rows and keys per tile of the layout."""
        return BLOCK if self.tile is None else math.prod(self.tile)

    def order(self, grid: tuple[int, int] | None = None) -> Tensor:
        """``(text + height·width,)`` int64: which row-major token stands in each slot of the sequence.

        ``x[:, order]`` brings row-major tokens into tile order, ``x[:, order.argsort()]`` back.
        """
        height, width = self._grid(grid)
        raster = torch.arange(height * width).view(height, width)
        if self.tile is not None:
            raster = raster.unflatten(1, (-1, self.tile[1])).unflatten(0, (-1, self.tile[0])).transpose(1, 2)
        return torch.cat([torch.arange(self.text), self.text + raster.flatten()])

    def pairs(self, grid: tuple[int, int] | None = None) -> int:
        """Visible pairs of one head, text included, in closed form; times ``4 · width of the model`` the operations of a layer."""
        return disc_pairs(self._grid(grid), self.text, self.radius)

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask``, made once per base mask; None when the disc covers the image.

        Raises:
            ShapeError: the grid does not match the length.
            ConfigError: no grid, or one that the tile does not divide.
            UnsupportedError: cross-attention.
        """
        base = ctx.base
        grid = self.fit(base, ctx.grid)
        if self.radius**2 > (grid[0] - 1) ** 2 + (grid[1] - 1) ** 2:
            return None, state
        memo = ("disc", self.radius, grid, self.text, self.tile)
        if memo not in base.cache:
            places = self.places(grid, base.kv_len).to(base.device)
            base.cache[memo] = near_layout(rows_of(places, base), places, self.radius**2, self.block)
        return base.cache[memo], state

    def fit(self, base: BaseMask, given: tuple[int, ...] | None = None) -> tuple[int, int]:
        """The grid for these lengths; raises what ``select`` raises."""
        grid = self._grid(given, whole=False)
        if not base.causal and base.q_len != base.kv_len:
            raise UnsupportedError(
                f"disc: {base.q_len} queries and {base.kv_len} keys; expected as many of both, because queries have places in the "
                "image. Cross-attention has no disc."
            )
        total = base.shift + base.q_len if base.causal else base.kv_len
        tokens = max(total - self.text, 0)
        if grid[0] == -1:
            return max(1, -(-tokens // grid[1])), grid[1]
        size = math.prod(grid)
        if tokens != size and not (base.causal and tokens < size):
            raise ShapeError(
                f"disc: grid is {grid!r}, {size} tokens, and the sequence has {total} with text = {self.text}; expected a "
                f"length of {size + self.text}."
            )
        return grid

    def places(self, grid: tuple[int, int], length: int) -> Places:
        """Places of the first ``length`` tokens of the sequence."""
        rows = max(grid[0], -(-max(length - self.text, 0) // grid[1]))
        slot = torch.arange(rows * grid[1])
        if self.tile is not None:
            slot = torch.cat([self.order(grid)[self.text :] - self.text, slot[math.prod(grid) :]])
        place = torch.cat([torch.zeros(self.text, dtype=torch.long), slot])[:length]
        y = torch.div(place, grid[1], rounding_mode="floor")
        return Places(y.int(), (place % grid[1]).int(), torch.arange(length) < self.text)

    def _grid(self, given: tuple[int, ...] | None, whole: bool = True) -> tuple[int, int]:
        grid = self.grid or given
        if grid is None or (whole and grid[0] == -1):
            raise ConfigError(
                f"Disc.grid is {self.grid!r} and the call gives {given!r}; expected (height, width) in one of them."
            )
        self._check_grid(grid)  # type: ignore[arg-type]
        return grid[0], grid[1]


def disc_pairs(grid: tuple[int, int], text: int, radius: int) -> int:
    """``ΣM = T(N+T) + N·T + Σ_{dx²+dy²<r²} (h−|dy|)₊ (w−|dx|)₊``."""
    height, width = grid
    n, r = height * width, radius
    total = text * (n + text) + n * text
    for dy in range(-min(r, height) + 1, min(r, height)):
        reach = math.isqrt(max(r * r - dy * dy - 1, 0))  # largest |dx| with dx² + dy² < r²
        reach = min(reach, width - 1)
        across = (2 * reach + 1) * width - reach * (reach + 1)
        total += (height - abs(dy)) * across
    return total


def proportional_scale(head_dim: int, keys: int, trained: int = TRAINED_TOKENS) -> float:
    """Scale of q·k above the trained resolution, ``sqrt(log_trained(keys) / head_dim)``; CLEAR takes ``10·keys`` with pooled tokens."""
    return math.sqrt(math.log(keys, trained) / head_dim)
