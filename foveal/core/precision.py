"""Average precision of scored detections."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .errors import ShapeError


def average_precision(scores: Tensor, hits: Tensor, truths: int) -> float:
    """Area under precision over recall, precision made monotone from the right (the envelope).

    Args:
        scores: ``(n,)``; equal scores keep their order. hits: ``(n,)`` bool, which detections found a truth of their own.
        truths: how many there were to find.

    Returns:
        0 to 1; 0 without detections, NaN where there was nothing to find.

    Raises:
        ShapeError: scores and hits that differ in shape.
    """
    if scores.dim() != 1 or scores.shape != hits.shape:
        raise ShapeError(
            f"scores has shape {tuple(scores.shape)} and hits {tuple(hits.shape)}; expected (n,) for both."
        )
    if truths == 0:
        return math.nan
    found = hits[scores.argsort(descending=True, stable=True)].double()
    count = found.cumsum(0)
    precision = count / torch.arange(1, len(found) + 1, dtype=torch.float64)
    envelope = precision.flip(0).cummax(0).values.flip(0) if len(found) else precision
    return float((envelope * found).sum()) / truths
