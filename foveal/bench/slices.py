"""A mask as a list of slices, LongCA-bench's interchange format: a range of queries, a range of keys, and a shape inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Shape = Literal["full", "causal", "inv_causal", "bi_causal"]
_SHAPES: dict[tuple[int, int], Shape] = {(0, 0): "full", (0, 1): "causal", (1, 0): "inv_causal", (1, 1): "bi_causal"}
"""By how far the first and the end key move from one row to the next."""


@dataclass(frozen=True)
class Slice:
    """Pairs inside a rectangle.

    Attributes:
        q, k: first and end position of queries and of keys.
        shape: ``full``; ``causal``: the last query sees the last key, each query before it one key less; ``inv_causal``: the first query
            sees the first key, each query after it starts one key later; ``bi_causal``: both.
    """

    q: tuple[int, int]
    k: tuple[int, int]
    shape: Shape

    def pairs(self, length: int) -> Tensor:
        """``(length, length)`` bool, for tests."""
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        seen = (i >= self.q[0]) & (i < self.q[1]) & (j >= self.k[0]) & (j < self.k[1])
        if self.shape in ("causal", "bi_causal"):
            seen = seen & (self.k[1] - 1 - j >= self.q[1] - 1 - i)
        if self.shape in ("inv_causal", "bi_causal"):
            seen = seen & (j - self.k[0] >= i - self.q[0])
        return seen


def from_intervals(lo: Tensor, hi: Tensor) -> list[Slice]:
    """Disjoint slices of rows that see the keys ``lo[i] <= j < hi[i]``; a slice goes on while both ends keep still or move by one."""
    out: list[Slice] = []
    first, step = 0, None
    ends = list(zip(lo.tolist(), hi.tolist(), strict=True))
    for i in range(1, len(ends) + 1):
        move = None
        if i < len(ends) and ends[i - 1][0] < ends[i - 1][1] and ends[i][0] < ends[i][1]:
            move = (ends[i][0] - ends[i - 1][0], ends[i][1] - ends[i - 1][1])
        if move in _SHAPES and step in (None, move):
            step = move
            continue
        if ends[first][0] < ends[first][1]:
            out.append(Slice((first, i), (ends[first][0], ends[i - 1][1]), _SHAPES[step or (0, 0)]))
        first, step = i, None
    return out
