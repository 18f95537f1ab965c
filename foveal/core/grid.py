"""Neighborhood windows along one axis of a token grid, in closed form.

Sources: Generalized Neighborhood Attention (GNA, arXiv 2504.16922) for window, stride, dilation and causality; Faster
Neighborhood Attention (FNA, arXiv 2403.04690) for the inverse window. A window of a multi-dimensional grid is the product of
the windows of its axes, so everything here is about one axis.

Words: a coordinate ``x`` of an axis with dilation ``d`` belongs to group ``x mod d`` and has the index ``x // d`` in it. Queries
see keys of their own group only; windows and strides count inside the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError


def window_spans(length: int, window: int, stride: int = 1, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Keys ``[start, end)`` of every query of one dilation group, ``(length,)`` int64 each.

    The queries of one stride group share a leader: the centre (for an even stride the right-hand one), or the last query on a
    causal axis. The window lies around the leader and slides inwards at the borders, so that it always holds ``window`` keys;
    an even window holds one more key on the left. On a causal axis it ends at the query itself and may hold fewer.
    """
    i = torch.arange(length)
    group = torch.div(i, stride, rounding_mode="floor") * stride
    if causal:
        leader = (group + stride - 1).clamp(max=length - 1)
        return (leader - window + 1).clamp(min=0), i + 1
    leader = (group + stride // 2).clamp(max=length - 1)
    start = (leader - window // 2).clamp(0, length - window)
    return start, start + window


def query_spans(length: int, window: int, stride: int = 1, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Queries ``[lo, hi)`` that see each key of one dilation group, ``(length,)`` int64 each: the inverse of ``window_spans``.

    Near a border more than ``window`` queries see one key (FNA, backward pass).
    """
    j = torch.arange(length)
    left = window // 2
    right, off = window - 1 - left, stride - stride // 2 - 1
    if causal:
        groups = torch.div(j + window, stride, rounding_mode="floor") + (j + window >= length)
        return j, (groups * stride).clamp(max=length)
    lo = torch.where(j >= window, torch.div(j - right + off, stride, rounding_mode="floor") * stride, 0)
    hi = torch.div(j + left + off + 1, stride, rounding_mode="floor") * stride
    return lo, torch.where(j >= length - window, length, hi)


@dataclass(frozen=True)
class Axis:
    """One axis of a grid and what a query sees along it.

    Attributes:
        length: tokens.
        window: keys that a query sees, at least 1; ``window · dilation <= length``.
        stride: neighbouring queries that share a window, from 1 (sliding) to ``window`` (blocked).
        dilation: distance between neighbouring keys.
        causal: no key after the query.

    Raises:
        ConfigError: a value out of range; the message names it and the range.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self) -> None:
        self.check("axis")

    def check(self, where: str) -> None:
        """Raise :class:`ConfigError` unless the values fit each other; ``where`` begins the message."""
        if self.length < 1:
            raise ConfigError(f"{where}: grid has an axis of {self.length} tokens; expected at least 1.")
        if not 1 <= self.dilation <= self.length:
            raise ConfigError(
                f"{where}: dilation is {self.dilation}; expected 1 to {self.length}, the tokens of the axis."
            )
        most = self.length // self.dilation
        if not 1 <= self.window <= most:
            raise ConfigError(
                f"{where}: window is {self.window}; expected 1 to {most}, because the axis has {self.length} tokens and "
                f"dilation is {self.dilation}."
            )
        if not 1 <= self.stride <= self.window:
            raise ConfigError(f"{where}: stride is {self.stride}; expected 1 to {self.window}, the window of the axis.")

    @property
    def whole(self) -> bool:
        """Every query sees every key."""
        return self.window == self.length and not self.causal

    def group_length(self, group: int) -> int:
        """Tokens of one dilation group; groups differ by at most one token."""
        return self.length // self.dilation + (group < self.length % self.dilation)

    def spans(self, group: int = 0) -> tuple[Tensor, Tensor]:
        """``window_spans`` of one dilation group."""
        return window_spans(self.group_length(group), self.window, self.stride, self.causal)

    def queries(self, group: int = 0) -> tuple[Tensor, Tensor]:
        """``query_spans`` of one dilation group."""
        return query_spans(self.group_length(group), self.window, self.stride, self.causal)

    def codes(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(code, low, high)``, ``(length,)`` int64 each: query ``x`` sees key ``y`` exactly when ``low[x] <= code[y] < high[x]``.

        Codes of one dilation group are consecutive, and groups lie apart.
        """
        x = torch.arange(self.length)
        group, index = x % self.dilation, torch.div(x, self.dilation, rounding_mode="floor")
        low, high = torch.empty_like(x), torch.empty_like(x)
        for g in range(self.dilation):
            low[g :: self.dilation], high[g :: self.dilation] = self.spans(g)
        first = group * self.length
        return first + index, first + low, first + high

    def keys(self) -> Tensor:
        """``(length, window)`` int64: key coordinates of every query in rising order; −1 where a causal window holds fewer."""
        code, low, high = self.codes()
        where = torch.full((self.dilation * self.length + 1,), -1)
        where[code] = torch.arange(self.length)
        listed = low[:, None] + torch.arange(self.window)
        return where[torch.where(listed < high[:, None], listed, -1)]

    def mask(self) -> Tensor:
        """``(length, length)`` bool, True where the query (row) sees the key (column)."""
        code, low, high = self.codes()
        return (code >= low[:, None]) & (code < high[:, None])

    def tile_spans(self, tile: int, group: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For tiles of ``tile`` consecutive queries of one group: ``(a, b, all_a, all_b)``, ``(tiles,)`` int64 each.

        Keys ``[a, b)`` are seen by some query of the tile, ``[all_a, all_b)`` by every one (empty where ``all_a >= all_b``).
        Exact, because starts and ends rise with the query and neighbouring windows overlap or touch.
        """
        start, end = self.spans(group)
        first = torch.arange(0, start.numel(), tile)
        last = (first + tile - 1).clamp(max=start.numel() - 1)
        return start[first], end[last], start[last], end[first]

    def tile_kinds(self, q_tile: int, kv_tile: int) -> tuple[Tensor, Tensor]:
        """``(touches, covers)``, ``(d·q tiles, d·key tiles)`` bool: some pair, and all pairs of real queries with a whole tile of real keys.

        Tiles are numbered by dilation group, then by place, as many in every group (``core.tiles.Tiling``).
        """
        d = self.dilation
        counts = [-(-self.length // (t * d)) for t in (q_tile, kv_tile)]
        touches = torch.zeros(d, counts[0], d, counts[1], dtype=torch.bool)
        covers = torch.zeros_like(touches)
        begin = torch.arange(counts[1]) * kv_tile
        for g in range(d):
            a, b, all_a, all_b = (x[:, None] for x in self.tile_spans(q_tile, g))
            touches[g, : a.shape[0], g] = (begin < b) & (begin + kv_tile > a)
            covers[g, : a.shape[0], g] = (begin >= all_a) & (begin + kv_tile <= all_b)
        return touches.flatten(0, 1).flatten(1, 2), covers.flatten(0, 1).flatten(1, 2)
