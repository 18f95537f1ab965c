"""The fewest largest values that reach a sum, for a few huge pools or many small ones, without sorting millions."""

from __future__ import annotations

import torch
from torch import Tensor

SLOTS = 1 << 14
SORTED = 1 << 15
"""Pools of at most this size are sorted; larger ones go through a histogram, and only one of its slots is sorted."""


def smallest_prefix(values: Tensor, candidate: Tensor, need: Tensor, *, count: bool = False, least: int = 0) -> Tensor:
    """In every pool the shortest prefix, by falling value, whose sum reaches ``need``; equal values go to the lower index.

    Args:
        values: ``(P, M)`` in [0, 1].
        candidate: ``(P, M)`` bool: which may be taken.
        need: ``(P,)``; when even all candidates do not reach it, all are taken.
        count: let every candidate weigh 1, so that ``need`` is a number of candidates.
        least: take at least so many (0 or 1) where there are candidates, even for a need of 0.

    Returns:
        ``(P, M)`` bool.
    """
    if values.shape[1] <= SORTED:
        return _by_sorting(values, candidate, need.double(), count, least)
    rows = [_by_histogram(*row, count, least) for row in zip(values, candidate, need.double(), strict=True)]
    return torch.stack(rows) if rows else candidate


def _by_sorting(values: Tensor, candidate: Tensor, need: Tensor, count: bool, least: int) -> Tensor:
    order = torch.where(candidate, values, -1.0).argsort(dim=1, descending=True, stable=True)
    mine = candidate.gather(1, order)
    weight = mine.double() if count else torch.where(mine, values.gather(1, order).double(), 0.0)
    before = weight.cumsum(1) - weight
    keep = (before < need[:, None]) & mine
    if least:
        keep[:, :least] |= mine[:, :least]
    return torch.zeros_like(candidate).scatter(1, order, keep)


def _by_histogram(values: Tensor, candidate: Tensor, need: Tensor, count: bool, least: int) -> Tensor:
    slot = torch.where(candidate, (values * SLOTS).long().clamp(0, SLOTS - 1), -1) + 1  # slot 0: no candidate
    weight = torch.ones_like(values, dtype=torch.float64) if count else values.double()
    mass = torch.bincount(slot, weights=weight, minlength=SLOTS + 1)[1:].flip(0)  # largest values first
    above = mass.cumsum(0) - mass
    cut = int((above < need).sum()) - 1  # the slot in which the need is reached
    if cut < 0:
        cut = int((torch.bincount(slot, minlength=SLOTS + 1)[1:].flip(0) > 0).long().argmax()) if least else -1
        if cut < 0:
            return torch.zeros_like(candidate)
    level = SLOTS - cut
    keep = slot > level
    inside = (slot == level).nonzero()[:, 0]
    rest = _by_sorting(
        values[inside][None],
        candidate[inside][None],
        (need - above[cut])[None],
        count,
        least if not bool(keep.any()) else 0,
    )[0]
    keep[inside] = rest
    return keep
