"""Packed documents: choose inside each document by itself, so that no pooled block mixes two of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.base_mask import FULL, BaseMask, Predicate
from ..core.layouts import BlockMask, block_mask


@dataclass(frozen=True)
class Document:
    """One document: batch row (None: all rows are packed alike) and its first and end position."""

    row: int | None
    first: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(None) if self.row is None else slice(self.row, self.row + 1)


def documents(base: BaseMask) -> list[Document]:
    """The documents of a packed batch; empty when nothing is packed."""
    if "documents" not in base.cache:
        base.cache["documents"] = _documents(base)
    return base.cache["documents"]


def _documents(base: BaseMask) -> list[Document]:
    if base.q_len != base.kv_len or base.shift != 0 or base.plain:
        return []
    starts = base.rank == 0
    if base.valid is not None:
        starts = starts & base.valid
    if int(starts.sum(-1).max()) <= 1:
        return []
    found = []
    for row in range(starts.shape[0]):
        edges = [*starts[row].nonzero()[:, 0].tolist(), base.kv_len]
        found += [Document(None if starts.shape[0] == 1 else row, a, b) for a, b in pairwise(edges)]
    return found


def crop(base: BaseMask, document: Document, start: int, stop: int) -> BaseMask:
    """The mask of rows and keys ``[start, stop)`` with everything outside ``document`` hidden as if it were padding."""
    at = torch.arange(start, stop, device=base.device)
    inside = (at >= document.first) & (at < document.stop)

    def pick(x: Tensor) -> Tensor:
        return (x[document.rows] if x.shape[0] > 1 else x)[:, start:stop]

    lo = torch.where(inside, pick(base.lo).clamp(start, stop) - start, 0)
    hi = torch.where(inside, pick(base.hi).clamp(start, stop) - start, 0)
    valid = inside[None] if base.valid is None else inside & pick(base.valid)
    rank = torch.where(inside, pick(base.rank), -1)
    predicate = None if base.predicate is None else _shifted(base.predicate, document.row or 0, start)
    return BaseMask(
        stop - start,
        stop - start,
        lo,
        torch.maximum(lo, hi),
        0,
        base.causal,
        rank,
        None if bool(valid.all()) else valid,
        predicate,
    )


def _shifted(predicate: Predicate, row: int, start: int) -> Predicate:
    return lambda b, h, q, k: predicate(b + row, h, q + start, k + start)


Keep = Callable[[Tensor, Tensor, BaseMask], Tensor]
"""``(q, k, base) → (B, H or Hkv or 1, nqb, nkb)`` bool: tiles kept of one unpacked sequence."""


def tile_layout(q: Tensor, k: Tensor, base: BaseMask, block: tuple[int, int], keep: Keep) -> BlockMask:
    """The ``BlockMask`` of what ``keep`` chooses, document by document where documents are packed.

    Tiles are FULL in the pattern's eyes; kernels intersect them with ``base``.
    """
    packed = documents(base)
    if not packed:
        tiles = _per_query_head(keep(q, k, base), q.shape[1])
    else:
        counts = (-(-base.q_len // block[0]), -(-base.kv_len // block[1]))
        tiles = torch.zeros(q.shape[0], q.shape[1], *counts, dtype=torch.bool, device=q.device)
        unit = math.lcm(*block)
        for document in packed:
            start, stop = document.first // unit * unit, min(-(-document.stop // unit) * unit, base.kv_len)
            part = slice(start, stop)
            some = keep(q[document.rows, :, part], k[document.rows, :, part], crop(base, document, start, stop))
            u, c = start // block[0], start // block[1]
            tiles[document.rows, :, u : u + some.shape[2], c : c + some.shape[3]] |= _per_query_head(some, q.shape[1])
    return block_mask(tiles.to(torch.int8) * FULL, block, (base.q_len, base.kv_len))


def _per_query_head(tiles: Tensor, heads: int) -> Tensor:
    return tiles.repeat_interleave(heads // tiles.shape[1], 1) if tiles.shape[1] > 1 else tiles
