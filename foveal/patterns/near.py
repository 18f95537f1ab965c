"""Layouts of tokens that lie near each other on a plane: a row keeps the keys within a distance, and text tokens.

Shared by ``disc`` and ``frame_band``. A block of tokens is a few *runs*: tokens of one row of the plane whose columns lie side by
side. Nearest and farthest pairs of two blocks follow from their runs, so tile kinds are exact and no pair of tokens is
evaluated until a cut tile is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import FULL, PARTIAL, BaseMask, Predicate
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


def rows_of(places: Places, base: BaseMask) -> Places:
    """Places of the query rows, where ``places`` are those of the keys."""
    if base.shift == 0 and base.q_len == base.kv_len:
        return places
    return places[(torch.arange(base.q_len, device=base.device) + base.shift).clamp(0, base.kv_len - 1)]


def tile_kinds(q: Places, k: Places, limit: int, block: int) -> Tensor:
    """``(q blocks, key blocks)`` int8 of EMPTY, PARTIAL, FULL, all three exact.

    The boxes around two blocks decide most pairs; of the others runs are compared.
    """
    cols = _runs(k, block)
    rows = cols if q is k else _runs(q, block)
    kinds = torch.empty(rows.y.shape[0], cols.y.shape[0], dtype=torch.int8, device=q.y.device)
    around = _boxes(cols)
    for part in torch.arange(kinds.shape[0], device=q.y.device).split(max(1, _PAIRS // max(kinds.shape[1], 1))):
        near, far = _apart([x[part, None] for x in _boxes(rows)], around)
        text = rows.text[part, None] | cols.text
        kinds[part] = torch.where(
            text | ((near < limit) & (far >= limit)), PARTIAL, (near < limit).to(torch.int8) * FULL
        )
    u, t = (kinds == PARTIAL).nonzero().unbind(1)
    per_pair = rows.y.shape[1] * cols.y.shape[1]
    for some in torch.arange(u.numel(), device=u.device).split(max(1, _PAIRS // per_pair)):
        kinds[u[some], t[some]] = _kinds(rows, cols, u[some], t[some], limit)
    return kinds


def _boxes(runs: _Runs) -> list[Tensor]:
    """Top, bottom, left and right of every block, ``(blocks,)`` each; of one without runs, nothing that counts."""
    y, first, last = (torch.where(runs.real, x, x[:, :1]) for x in (runs.y, runs.first, runs.last))
    return [y.amin(1), y.amax(1), first.amin(1), last.amax(1)]


def _apart(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Squared distances of the nearest and of the farthest places of two boxes of top, bottom, left and right."""
    near = far = torch.zeros((), dtype=a[0].dtype, device=a[0].device)
    for axis in (0, 2):
        gap = torch.maximum(b[axis] - a[axis + 1], a[axis] - b[axis + 1]).clamp_(min=0)
        reach = torch.maximum(b[axis + 1] - a[axis], a[axis + 1] - b[axis])
        near, far = near + gap * gap, far + reach * reach
    return near, far


def _kinds(rows: _Runs, cols: _Runs, u: Tensor, t: Tensor, limit: int) -> Tensor:
    """Kinds of the tiles ``(u[i], t[i])``, from their runs."""
    ay, a0, a1, a_real = (x[u, :, None] for x in (rows.y, rows.first, rows.last, rows.real))
    by, b0, b1, b_real = (x[t, None] for x in (cols.y, cols.first, cols.last, cols.real))
    near, far = _apart([ay, ay, a0, a1], [by, by, b0, b1])
    real = a_real & b_real
    nearest = torch.where(real, near, _FAR).flatten(1).amin(1)
    farthest = torch.where(real, far, -1).flatten(1).amax(1)
    touches = (nearest < limit) | rows.text[u] | cols.text[t]
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
