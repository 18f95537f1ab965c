"""Neighborhood attention on 1-D, 2-D and 3-D token grids (GNA, arXiv 2504.16922; FNA, arXiv 2403.04690)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import Tensor

from ..core.context import SelectContext, State
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..core.grid import Axis
from ..core.layouts import Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..core.tiles import Tiling
from .base import LookAhead, Pattern
from .neighborhood_layout import layout_of
from .neighborhood_place import Place


@register("pattern", "neighborhood")
@dataclass(frozen=True)
class Neighborhood(Pattern):
    """Each token of a grid sees the window of its nearest neighbours along every axis.

    Attributes:
        grid: tokens per axis, row-major in the sequence. The first may be −1: it follows the length, and a window larger than it
            then sees all of it. None takes the grid of the context.
        window: keys along each axis, counting the query. Like the next three fields one value for all axes, or one each.
        stride: neighbouring queries that share a window: 1 slides, ``window`` cuts the grid into blocks.
        dilation: distance between neighbouring keys; ``window · dilation`` may not exceed the axis.
        causal: no later key along this axis.
        extra: last tokens of the sequence, outside the grid, that every query sees; as queries they see everything.
        q_tile, kv_tile: shapes of tiles. When given, the sequence is in the order of ``Tiling``: queries by ``q_tile``, keys by
            ``kv_tile`` (default the same). None means row-major.
        layout: "blocks" for tiles that every kernel takes, "lists" for exact keys per stride group, "auto" for the cheaper one.

    Exact definition per axis: ``foveal.core.grid.window_spans``. Windows never shrink at borders; they slide inwards.
    """

    grid: tuple[int, ...] | None
    window: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    extra: int = 0
    q_tile: tuple[int, ...] | None = None
    kv_tile: tuple[int, ...] | None = None
    layout: Literal["auto", "blocks", "lists"] = "auto"

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "extra", low=0)
        for name in ("grid", "window", "stride", "dilation", "q_tile", "kv_tile"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            low = [-1 if name == "grid" and a == 0 and n == -1 else 1 for a, n in enumerate(values)]
            if value == () or any(n < least for n, least in zip(values, low, strict=True)):
                first = ", the first perhaps −1" if name == "grid" else ""
                raise ConfigError(
                    f"Neighborhood.{name} is {value!r}; expected numbers of at least 1, one per axis{first}."
                )
        if self.grid is not None:
            for window, stride, _, _ in self._per_axis(len(self.grid)):
                if stride > window:
                    raise ConfigError(
                        f"Neighborhood.stride is {self.stride!r}; expected at most the window, {self.window!r}, on every axis."
                    )
            for name in ("q_tile", "kv_tile"):
                tile = getattr(self, name)
                if tile is not None and len(tile) != len(self.grid):
                    raise ConfigError(
                        f"Neighborhood.{name} is {tile!r}; expected {len(self.grid)} numbers, one for each axis of the grid."
                    )
            if self.grid[0] != -1:
                self.axes()
        if self.kv_tile is not None and self.q_tile is None:
            raise ConfigError(
                f"Neighborhood.kv_tile is {self.kv_tile!r} without q_tile; expected both, or q_tile alone."
            )

    # --- presets -------------------------------------------------------------------------------------------------

    @classmethod
    def sliding(cls, grid: tuple[int, ...], window: int | tuple[int, ...], **fields: Any) -> Self:
        """Every query has its own window: classic neighborhood attention."""
        return cls(grid, window, **fields)

    @classmethod
    def blocked(cls, grid: tuple[int, ...], window: int | tuple[int, ...], **fields: Any) -> Self:
        """The grid cut into blocks that attend among themselves (Swin without the shift); a last, incomplete block keeps a whole window."""
        return cls(grid, window, window, **fields)

    swin = blocked

    @classmethod
    def halo(
        cls, grid: tuple[int, ...], block: int | tuple[int, ...], halo: int | tuple[int, ...], **fields: Any
    ) -> Self:
        """Blocks that see ``halo`` tokens around them (HaloNet); at borders the window slides inwards where HaloNet pads with zeros.

        Raises:
            ConfigError: a block of less than one token, or a negative halo.
        """
        sizes = _sizes("halo: block", block, len(grid))
        around = _sizes("halo: halo", halo, len(grid), least=0)
        return cls(grid, tuple(b + 2 * h for b, h in zip(sizes, around, strict=True)), sizes, **fields)

    @classmethod
    def sta(
        cls, grid: tuple[int, ...], tile: int | tuple[int, ...], window: int | tuple[int, ...], **fields: Any
    ) -> Self:
        """Sliding-tile attention: stride ``tile``, a window of whole tiles, and both tile shapes the same.

        Raises:
            ConfigError: ``tile`` is no size, or does not divide window and grid.
        """
        tiles, windows = (
            _sizes(f"sta: {name}", sizes, len(grid)) for name, sizes in (("tile", tile), ("window", window))
        )
        for name, sizes in (("window", windows), ("grid", tuple(grid))):
            if any(n % t for n, t in zip(sizes, tiles, strict=True)):
                raise ConfigError(f"Neighborhood.sta: {name} is {sizes!r}; expected multiples of the tile {tiles!r}.")
        return cls(grid, windows, tiles, **fields)

    # --- what it means -------------------------------------------------------------------------------------------

    def _per_axis(self, rank: int) -> list[tuple[int, int, int, bool]]:
        if rank > 3:
            raise ConfigError(f"Neighborhood.grid has {rank} axes; expected one, two or three.")
        names = ("window", "stride", "dilation", "causal")
        return list(zip(*(_spread(name, getattr(self, name), rank) for name in names), strict=True))

    def axes(self, grid: tuple[int, ...] | None = None) -> tuple[Axis, ...]:
        """The axes of this grid (default the pattern's own).

        Raises:
            ConfigError: a window, stride or dilation that does not fit.
        """
        grid = grid or self.grid
        if grid is None or grid[0] == -1:
            raise ConfigError(f"Neighborhood.grid is {grid!r}; expected the tokens of every axis here.")
        found = []
        for a, (n, (window, stride, dilation, causal)) in enumerate(zip(grid, self._per_axis(len(grid)), strict=True)):
            if a == 0 and self.grid is not None and self.grid[0] == -1:  # follows the length
                window = min(window, max(1, n // dilation))
                stride = min(stride, window)
            try:
                found.append(Axis(n, window, stride, dilation, causal))
            except ConfigError as error:
                raise ConfigError(
                    str(error).replace("axis", f"neighborhood on axis {a} of grid {tuple(grid)!r}", 1)
                ) from None
        return tuple(found)

    def tilings(self, grid: tuple[int, ...] | None = None) -> tuple[Tiling, Tiling]:
        """The orders of queries and keys.

        Raises:
            ConfigError: the pattern has no ``q_tile``.
        """
        axes = self.axes(grid)
        if self.q_tile is None:
            raise ConfigError("Neighborhood.q_tile is None; expected a tile shape, one number per axis.")
        sizes = tuple(axis.length for axis in axes)
        dilation = tuple(axis.dilation for axis in axes)
        return Tiling(sizes, self.q_tile, dilation), Tiling(sizes, self.kv_tile or self.q_tile, dilation)

    def tiled(self, q_tile: tuple[int, ...], kv_tile: tuple[int, ...] | None = None) -> Self:
        """The same pattern over a sequence in tile order."""
        return replace(self, q_tile=tuple(q_tile), kv_tile=None if kv_tile is None else tuple(kv_tile))

    @property
    def static(self) -> bool:
        return True

    @property
    def look_ahead(self) -> LookAhead:
        """A window that slides inwards at the end of a growing axis depends on where the end is."""
        if self.grid is not None and self.grid[0] != -1:
            return "none"
        _, stride, _, causal = self._per_axis(len(self.grid) if self.grid else 1)[0]
        return "none" if causal and stride == 1 else "prefill"

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask``; or key lists per stride group, which are exact, where they are cheaper.

        Raises:
            ShapeError: the grid does not match the length.
            ConfigError: window, stride or dilation do not fit the grid.
            UnsupportedError: cross-attention, or a causal model with tile order.
        """
        place = self._place(ctx)
        if place.dense:
            return None, state
        return layout_of(place, q.shape[0], ctx.base.device), state

    def _place(self, ctx: SelectContext) -> Place:
        base = ctx.base
        grid = self.grid or ctx.grid or (-1,)
        total = base.shift + base.q_len if base.causal else base.kv_len
        if self.q_tile is not None:
            return self._tile_place(ctx, grid)
        if not base.causal and base.q_len not in (base.kv_len, base.kv_len - self.extra):
            raise UnsupportedError(
                f"neighborhood: {base.q_len} queries and {base.kv_len} keys; expected as many of both, or {self.extra} keys "
                "more (extra). Queries that are no tokens of the grid have no neighborhood."
            )
        tokens = total - self.extra
        if grid[0] == -1:
            rest = math.prod(grid[1:])
            if tokens < 1 or (tokens % rest and not base.causal):
                raise ShapeError(
                    f"neighborhood: grid is {grid!r} and the sequence has {tokens} tokens (extra = {self.extra}); expected "
                    f"a multiple of {rest}."
                )
            grid = (-(-tokens // rest), *grid[1:])
        fits = math.prod(grid) >= tokens > 0 if base.causal and not self.extra else math.prod(grid) == tokens
        if not fits:
            raise ShapeError(
                f"neighborhood: grid is {grid!r}, {math.prod(grid)} tokens, and the sequence has {total} with extra = "
                f"{self.extra}; expected a length of {math.prod(grid) + self.extra}."
            )
        return Place(self.axes(grid), None, base.q_len, base.kv_len, base.shift, base.causal, self.extra, self.layout)

    def _tile_place(self, ctx: SelectContext, grid: tuple[int, ...]) -> Place:
        base = ctx.base
        if base.causal:
            raise UnsupportedError(
                "neighborhood: a sequence in tile order (q_tile) has no causal order of its own; expected a bidirectional "
                "model. Use row-major order, q_tile=None."
            )
        tilings = self.tilings(grid)
        for name, length, tiling, fit in (
            ("queries", base.q_len, tilings[0], (0, self.extra)),
            ("keys", base.kv_len, tilings[1], (self.extra,)),
        ):
            if length - tiling.length not in fit:
                raise ShapeError(
                    f"neighborhood: {length} {name}; expected {tiling.length + fit[-1]}: grid {grid!r} in tiles of "
                    f"{tiling.tile!r} has {tiling.length} slots, and extra is {self.extra}. Order tokens with Tiling.permute."
                )
        return Place(self.axes(grid), tilings, base.q_len, base.kv_len, 0, False, self.extra, self.layout)


def _spread(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    """One value for all axes, or one each."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank
    if len(values) != rank:
        raise ConfigError(
            f"Neighborhood.{name} is {value!r}; expected one value, or {rank}, one for each axis of the grid."
        )
    return values


def _sizes(name: str, value: Any, rank: int, least: int = 1) -> tuple[int, ...]:
    """One whole number for all axes, or one each."""
    values = _spread(name, value, rank)
    if not all(isinstance(n, int) and n >= least for n in values):
        raise ConfigError(f"Neighborhood.{name} is {value!r}; expected whole numbers of at least {least}.")
    return values
