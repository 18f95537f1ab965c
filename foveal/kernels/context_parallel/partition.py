"""Which rank holds which tokens: contiguous, zig-zag (also inside every document) and striped, as bijections with padding.

``R`` ring shards, each cut into ``U`` contiguous slices for Ulysses, make ``P = R·U`` ranks. Every shard keeps the order of
its tokens, so that whatever is one interval of keys in the whole sequence is one interval in a shard too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...core.errors import ConfigError, ShapeError, nearest

PARTITIONS = ("contiguous", "zigzag", "striped")


@dataclass(frozen=True)
class Partition:
    """The places of ``total`` tokens.

    Attributes:
        total: tokens of the whole sequence. ring, ulysses: R and U.
        kind: ``"contiguous"``; ``"zigzag"``, where of 2R chunks shard r holds the chunks r and 2R−1−r; ``"striped"``, where
            shard r holds the tokens ≡ r modulo R.
        documents: lengths of packed documents; zig-zag then cuts every document by itself.
        pad: fill documents and sequence up to lengths that divide evenly; without it such lengths are an error.
    """

    total: int
    ring: int = 1
    ulysses: int = 1
    kind: str = "zigzag"
    documents: tuple[int, ...] | None = None
    pad: bool = False

    def __post_init__(self) -> None:
        if self.kind not in PARTITIONS:
            raise ConfigError(f"partition {self.kind!r} is unknown. {nearest(self.kind, PARTITIONS)}")
        for name, value in (("total", self.total), ("ring", self.ring), ("ulysses", self.ulysses)):
            if value < 1:
                raise ConfigError(f"Partition.{name} is {value}; expected at least 1.")
        if self.documents is not None and (sum(self.documents) != self.total or min(self.documents) < 1):
            raise ShapeError(
                f"documents have lengths {list(self.documents)[:8]} with sum {sum(self.documents)}; expected lengths of at least 1 "
                f"whose sum is the number of tokens, {self.total}."
            )
        if not self.pad:
            unit, each = self._unit, self._each
            bad = [length for length in self._lengths if length % unit]
            if bad or self.total % (unit * self.ulysses):
                raise ShapeError(
                    f"{self.total} tokens{f' with a document of {bad[0]}' if bad and self.documents else ''} do not divide over {self.ring} ring × "
                    f"{self.ulysses} Ulysses ranks ({self.kind}): expected {'documents' if each else 'a length'} in multiples of "
                    f"{unit if each else unit * self.ulysses}. Use another length or mesh, or pad=True."
                )

    @property
    def _unit(self) -> int:
        return 2 * self.ring if self.kind == "zigzag" and self.ring > 1 else self.ring

    @property
    def _each(self) -> bool:
        """Whether documents are cut one by one."""
        return self.documents is not None and self.kind == "zigzag" and self.ring > 1

    @property
    def _lengths(self) -> tuple[int, ...]:
        return self.documents if self._each and self.documents is not None else (self.total,)

    @cached_property
    def _padded(self) -> tuple[tuple[int, int], ...]:
        """Real and padded length of every piece that is cut by itself; the last one may be padding alone."""
        unit = self._unit
        pieces = [(length, -(-length // unit) * unit) for length in self._lengths]
        rest = -sum(full for _, full in pieces) % (unit * self.ulysses)
        return tuple(pieces) if not rest else (*pieces, (0, rest))

    @property
    def length(self) -> int:
        """Places in all, padding included; ``length / P`` are held by each rank."""
        return sum(full for _, full in self._padded)

    @property
    def local(self) -> int:
        """Places that one rank holds."""
        return self.length // (self.ring * self.ulysses)

    @cached_property
    def tokens(self) -> Tensor:
        """``(length,)`` int64: the token at each place, in the order of the sequence; −1 is padding."""
        parts, start = [], 0
        for real, full in self._padded:
            parts += [torch.arange(start, start + real), torch.full((full - real,), -1)]
            start += real
        return torch.cat(parts)

    @cached_property
    def places(self) -> Tensor:
        """``(total,)`` int64: the place of each token."""
        return (self.tokens >= 0).nonzero()[:, 0]

    def shard(self, ring_rank: int) -> Tensor:
        """``(length / R,)`` int64, rising: the places of one ring shard, which its U Ulysses ranks share."""
        r, ring = ring_rank, self.ring
        if self.kind == "striped":
            return torch.arange(r, self.length, ring)
        if self.kind == "contiguous" or ring == 1:
            size = self.length // ring
            return torch.arange(r * size, (r + 1) * size)
        parts, start = [], 0
        for _, full in self._padded:
            h = full // (2 * ring)
            parts += [torch.arange(start + c * h, start + (c + 1) * h) for c in (r, 2 * ring - 1 - r)]
            start += full
        return torch.cat(parts)

    def own(self, ring_rank: int, ulysses_rank: int) -> Tensor:
        """``(local,)`` int64: the places that one rank holds."""
        return self.shard(ring_rank)[ulysses_rank * self.local : (ulysses_rank + 1) * self.local]

    def dispatch(self, x: Tensor, ring_rank: int, ulysses_rank: int, dim: int = -2, fill: float = 0) -> Tensor:
        """One rank's part of ``x``, which has ``total`` tokens along ``dim``; padding is ``fill``.

        Raises:
            ShapeError: another length.
        """
        if x.shape[dim] != self.total:
            raise ShapeError(f"the tensor has {x.shape[dim]} tokens in dimension {dim}; expected {self.total}.")
        tokens = self.tokens[self.own(ring_rank, ulysses_rank)].to(x.device)
        part = x.index_select(dim, tokens.clamp(min=0))
        if bool((tokens < 0).any()):
            shape = [1] * x.dim()
            shape[dim] = -1
            part = torch.where((tokens < 0).view(shape), torch.full((), fill, dtype=x.dtype, device=x.device), part)
        return part

    def undispatch(self, parts: Sequence[Tensor], dim: int = -2) -> Tensor:
        """The whole tensor from the parts of all ranks, ordered by ring rank, then Ulysses rank."""
        where = torch.cat([self.own(r, u) for r in range(self.ring) for u in range(self.ulysses)])
        order = torch.empty_like(where)
        order[where] = torch.arange(where.numel())
        return torch.cat(list(parts), dim).index_select(dim, order[self.places].to(parts[0].device))
