"""Structural average precision of line segments, in coordinates of a 128 × 128 image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from ...core.errors import ShapeError
from ...core.precision import average_precision
from .detector import Lines

THRESHOLDS = (5.0, 10.0, 15.0)


def structural_ap(found: Sequence[Lines], truth: Sequence[Tensor], threshold: float) -> float:
    """sAP, 0 to 1; NaN without any true segment.

    The distance is the sum of both ends' squared distances in the better order. A detection is true when its nearest true segment is
    nearer than the threshold and no better detection has taken it; a second-nearest one is not tried, as published. In an image
    without true segments every detection is false.

    Args:
        found: per image. truth: per image ``(k, 2, 2)``, in the same coordinates. threshold: θ.

    Raises:
        ShapeError: not as many images of both.
    """
    if len(found) != len(truth):
        raise ShapeError(f"found has {len(found)} images and truth {len(truth)}; expected the same.")
    hits = [_hits(one, real, threshold) for one, real in zip(found, truth, strict=True)]
    if not hits:
        return math.nan
    return average_precision(torch.cat([one.scores for one in found]), torch.cat(hits), sum(len(t) for t in truth))


def mean_structural_ap(found: Sequence[Lines], truth: Sequence[Tensor], side: float) -> float:
    """msAP: the mean of sAP at 5, 10 and 15 of images whose sides are ``side`` pixels."""
    scale = 128 / side
    scaled = [Lines(one.segments * scale, one.scores) for one in found]
    real = [t * scale for t in truth]
    return fmean(structural_ap(scaled, real, theta) for theta in THRESHOLDS)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """``(n, m)`` structural distances of segments ``(n, 2, 2)`` and ``(m, 2, 2)``."""
    straight, crossed = ((a[:, None] - other[None]).square().sum((-1, -2)) for other in (b, b.flip(1)))
    return torch.minimum(straight, crossed)


def _hits(found: Lines, truth: Tensor, threshold: float) -> Tensor:
    hits = torch.zeros(len(found.scores), dtype=torch.bool)
    if not len(truth) or not len(hits):
        return hits
    nearest = distances(found.segments, truth.to(found.segments)).min(1)
    taken: set[int] = set()
    for k in found.scores.argsort(descending=True, stable=True).tolist():
        which = int(nearest.indices[k])
        if float(nearest.values[k]) < threshold and which not in taken:
            taken.add(which)
            hits[k] = True
    return hits
