"""Static families over one sequence: every row sees one interval of keys, under two of them also the first keys of the sequence.

Each class has the paper's predicate as ``allow``, the same as intervals (``rows``, O(N)) and the closed form of its area; tests compare
the three. T is the length. The families over packed documents are in ``masks_documents``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.layouts import BlockMask, block_mask
from .masks import Draw, Mask, Plain, family
from .slices import Slice, from_intervals

WINDOW = 1024
BLOCK = 128
"""Rows and keys of a tile of the layouts."""


class Rows(NamedTuple):
    """Row ``i`` sees keys ``lo[i] <= j < hi[i]`` and ``j < head[i]``; where ``head`` is not 0 it lies below ``lo``."""

    lo: Tensor
    hi: Tensor
    head: Tensor


@dataclass(frozen=True)
class Static(Mask):
    """A mask shared by all heads."""

    length: int

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        """The definition: may query ``i`` see key ``j``? Elementwise."""
        raise NotImplementedError

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        """First and end key of every row's own interval, before it is cut to the sequence."""
        raise NotImplementedError

    def head(self, i: Tensor) -> Tensor:
        """How many first keys every row sees besides."""
        return torch.zeros_like(i)

    @cached_property
    def rows(self) -> Rows:
        """The same mask in O(N) numbers."""
        i = torch.arange(self.length)
        lo, hi = (x.clamp(0, self.length) for x in self.interval(i))
        head = self.head(i)
        joined = head >= lo
        return Rows(
            torch.where(joined, 0, lo), torch.where(joined, torch.maximum(head, hi), hi), torch.where(joined, 0, head)
        )

    def pairs(self, rows: Tensor) -> Tensor:
        """``(1, rows, T)`` bool, from the intervals."""
        lo, hi, head = (x.to(rows.device)[rows, None] for x in self.rows)
        j = torch.arange(self.length, device=rows.device)[None]
        return (((j >= lo) & (j < hi)) | (j < head))[None]

    def layout(self, num_heads: int, device: torch.device | str = "cpu") -> tuple[BlockMask | None, BaseMask]:
        """Intervals alone, except where rows also see the first keys; these are a ``BlockMask``."""
        t, (lo, hi, head) = self.length, (x.to(device) for x in self.rows)
        plain = self.plain()
        if plain is not None and plain.window == (-1, -1) and not plain.documents:
            return None, BaseMask.build(t, t, causal=plain.causal, device=device)
        near = BaseMask(t, t, lo[None], hi[None], 0, bool((hi <= torch.arange(1, t + 1, device=device)).all()), torch.arange(t, device=device)[None])  # fmt: skip
        if not bool(head.any()):
            return None, near
        early = BaseMask(t, t, torch.zeros_like(head)[None], head[None], 0, False, near.rank)
        kinds = torch.maximum(near.block_map(BLOCK, BLOCK), early.block_map(BLOCK, BLOCK))

        def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return ((j >= lo[i]) & (j < hi[i])) | (j < head[i])

        return block_mask(kinds[:, None], (BLOCK, BLOCK), (t, t), kept), BaseMask.build(
            t, t, causal=False, device=device
        )

    def slices(self) -> list[list[Slice]]:
        """Slices of the intervals, then of the first keys."""
        lo, hi, head = self.rows
        return [from_intervals(lo, hi) + from_intervals(torch.zeros_like(head), head)]


def full_sliding_area(length: int, window: int) -> int:
    """Pairs with ``|i − j| ≤ window``."""
    w = min(window, length - 1)
    return length * (2 * w + 1) - w * (w + 1) if length else 0


def triangle(length: int) -> int:
    """Pairs with ``j ≤ i``."""
    return length * (length + 1) // 2


@family(1, "full", "F")
@dataclass(frozen=True)
class Full(Static):
    @classmethod
    def draw(cls, draw: Draw) -> Full:
        return cls(draw.length)

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return (i >= 0) & (j >= 0)

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), torch.full_like(i, self.length)

    def area(self) -> int:
        return self.length**2

    def plain(self) -> Plain:
        return Plain(causal=False)


@family(2, "causal", "C")
@dataclass(frozen=True)
class Causal(Static):
    @classmethod
    def draw(cls, draw: Draw) -> Causal:
        return cls(draw.length)

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), i + 1

    def area(self) -> int:
        return triangle(self.length)

    def plain(self) -> Plain:
        return Plain(causal=True)


@dataclass(frozen=True)
class Windowed(Static):
    """A family with a window of ``window`` keys besides the query."""

    window: int

    def facts(self) -> dict[str, Any]:
        return {"window": self.window}


@family(3, "full_sliding", "FSW")
@dataclass(frozen=True)
class FullSliding(Windowed):
    @classmethod
    def draw(cls, draw: Draw, *, window: int = WINDOW) -> FullSliding:
        return cls(draw.length, window)

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= self.window

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return i - self.window, i + self.window + 1

    def area(self) -> int:
        return full_sliding_area(self.length, self.window)

    def plain(self) -> Plain:
        return Plain(causal=False, window=(self.window, self.window))


@family(4, "causal_sliding", "CSW")
@dataclass(frozen=True)
class CausalSliding(Windowed):
    @classmethod
    def draw(cls, draw: Draw, *, window: int = WINDOW) -> CausalSliding:
        return cls(draw.length, window)

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return (i - j >= 0) & (i - j <= self.window)

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return i - self.window, i + 1

    def area(self) -> int:
        w = min(self.window, self.length - 1)
        return (w + 1) * self.length - w * (w + 1) // 2

    def plain(self) -> Plain:
        return Plain(causal=True, window=(self.window, 0))


@family(9, "prefix_lm_causal", "PLC")
@dataclass(frozen=True)
class PrefixCausal(Static):
    """Causal, and every row sees the first ``prefix`` keys."""

    random = True
    prefix: int

    @classmethod
    def draw(cls, draw: Draw, *, prefix: int = 0) -> PrefixCausal:
        """``prefix`` 0: uniform from 1 to T."""
        return cls(draw.length, min(prefix, draw.length) or draw.number(1, draw.length))

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) | (j < self.prefix)

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(i), (i + 1).clamp(min=self.prefix)

    def area(self) -> int:
        return triangle(self.length) + self.prefix * (self.prefix - 1) // 2

    def facts(self) -> dict[str, Any]:
        return {"prefix": self.prefix}


@family(11, "global_sliding", "GS")
@dataclass(frozen=True)
class GlobalSliding(Windowed):
    """A window to both sides; the first ``window`` tokens see everything and everything sees them.

    The paper's text; its code has two other definitions (card, errata).
    """

    random = True

    @classmethod
    def draw(cls, draw: Draw, *, window: int = 0) -> GlobalSliding:
        """``window`` 0: uniform from 1 to T/3 − 1."""
        return cls(draw.length, window or draw.number(1, draw.length // 3 - 1))

    def allow(self, i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() <= self.window) | (i < self.window) | (j < self.window)

    def interval(self, i: Tensor) -> tuple[Tensor, Tensor]:
        everything = i < self.window
        return torch.where(everything, 0, i - self.window), torch.where(everything, self.length, i + self.window + 1)

    def head(self, i: Tensor) -> Tensor:
        return torch.full_like(i, min(self.window, self.length))

    def area(self) -> int:
        rest = max(self.length - self.window, 0)
        return self.length**2 - rest**2 + full_sliding_area(rest, self.window)
