"""Layouts of tokens that lie near each other on a plane: a row keeps the keys within a distance, and text tokens.

Shared by ``disc`` and ``frame_band``. A block of tokens is a few *runs*: tokens of one row of the plane whose columns lie side by
side. Nearest and farthest pairs of two blocks follow from their runs, so tile kinds are exact and no pair of tokens is
evaluated until a cut tile is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import FULL, PARTIAL, Predicate
from ..core.layouts import BlockMask, block_mask

BLOCK = 128
_FAR = 1 << 30
_PAIRS = 1 << 22
"""Pairs of runs compared at once, at most."""


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a sequence lie.

    Attributes:
        y, x: ``(N,)`` int32 row and column of every token; without meaning for text.
        text: ``(N,)`` bool, tokens without a place: they see everything and everything sees them.
    """

    y: Tensor
    x: Tensor
    text: Tensor

    def __getitem__(self, index: Tensor | slice) -> Places:
        return Places(self.y[index], self.x[index], self.text[index])

    def __len__(self) -> int:
        return self.text.numel()

    def to(self, device: torch.device | str) -> Places:
        """The same places with tensors on ``device``."""
        return Places(self.y.to(device), self.x.to(device), self.text.to(device))


@dataclass(frozen=True, eq=False)
class _Runs:
    """Runs of every block, ``(blocks, R)`` each, ``real`` False where a block has fewer; and whether it holds text."""

    y: Tensor
    first: Tensor
    last: Tensor
    real: Tensor
    text: Tensor


def near_layout(q: Places, k: Places, limit: int, block: int = BLOCK) -> BlockMask:
    """Keep pairs whose squared distance is below ``limit``, and every pair with a text token.

    Args:
        q, k: places of the query rows and of the keys.
        limit: squared distance from which on a key is hidden.
        block: rows and keys per tile.
    """
    kinds = tile_kinds(q, k, limit, block)
    return block_mask(kinds[None, None], (block, block), (len(q), len(k)), _mask_mod(q, k, limit))


def tile_kinds(q: Places, k: Places, limit: int, block: int) -> Tensor:
    """``(q blocks, key blocks)`` int8 of EMPTY, PARTIAL, FULL, all three exact."""
    rows, cols = _runs(q, block), _runs(k, block)
    per_row = cols.y.numel() * rows.y.shape[1]
    parts = []
    for some in torch.arange(rows.y.shape[0], device=q.y.device).split(max(1, _PAIRS // max(per_row, 1))):
        y, first, last, real = (t[some, None] for t in (rows.y, rows.first, rows.last, rows.real))
        a = _Runs(y, first, last, real, rows.text[some])
        parts.append(_kinds(a, cols, limit))
    return torch.cat(parts)


def _kinds(a: _Runs, b: _Runs, limit: int) -> Tensor:
    """Tile kinds of query blocks ``a`` (runs ``(n, 1, R)``) with key blocks ``b`` (runs ``(m, S)``)."""
    ay, a0, a1, a_real = (t[..., None] for t in (a.y, a.first, a.last, a.real))  # (n, 1, R, 1)
    by, b0, b1, b_real = (t[None, :, None] for t in (b.y, b.first, b.last, b.real))  # (1, m, 1, S)
    down = ay - by
    down *= down  # integers are slow to raise to a power
    gap = torch.maximum(b0 - a1, a0 - b1).clamp_(min=0)
    gap *= gap
    reach = torch.maximum(b1 - a0, a1 - b0)
    reach *= reach
    real = a_real & b_real
    nearest = torch.where(real, gap.add_(down), _FAR).flatten(2).amin(-1)
    farthest = torch.where(real, reach.add_(down), -1).flatten(2).amax(-1)
    touches = (nearest < limit) | a.text[:, None] | b.text[None]
    kinds = touches.to(torch.int8) * PARTIAL
    kinds[touches & (farthest < limit)] = FULL
    return kinds


def _runs(places: Places, block: int) -> _Runs:
    n, device = len(places), places.y.device
    blocks = -(-n // block)
    at = torch.arange(n, device=device)
    begins = at % block == 0
    step = places.x.diff()
    begins[1:] |= (places.y.diff() != 0) | (step < 0) | (step > 1) | places.text[:-1]
    image = at[~places.text]
    text = torch.zeros(blocks, dtype=torch.bool, device=device)
    text[torch.div(at[places.text], block, rounding_mode="floor")] = True
    run = begins[image].long().cumsum(0) - 1
    first = image[begins[image]]
    number = torch.arange(first.numel(), device=device)
    last = image[torch.searchsorted(run, number, right=True) - 1]
    of = torch.div(first, block, rounding_mode="floor")
    place = number - torch.searchsorted(of, of)
    width = int(place.max()) + 1 if place.numel() else 1

    def table(values: Tensor) -> Tensor:
        out = torch.zeros(blocks, width, dtype=values.dtype, device=device)
        out[of, place] = values
        return out

    real = table(torch.ones_like(first, dtype=torch.bool))
    return _Runs(table(places.y[first]), table(places.x[first]), table(places.x[last]), real, text)


def _mask_mod(q: Places, k: Places, limit: int) -> Predicate:
    def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        down, across = q.y[i] - k.y[j], q.x[i] - k.x[j]
        return q.text[i] | k.text[j] | (down * down + across * across < limit)

    return kept
