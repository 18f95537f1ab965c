"""Rank correlation."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_ranks(values: Tensor) -> Tensor:
    """``(N,)`` float64 ranks from 1; equal values share their mean rank."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2.0)[place].double()


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two ``(N,)`` tensors; NaN where either is constant."""
    x, y = (r - r.mean() for r in (mean_ranks(a), mean_ranks(b)))
    scale = float(x.norm() * y.norm())
    return float(torch.dot(x, y)) / scale if scale > 0 else math.nan
