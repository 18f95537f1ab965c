"""What BMN learns: labels of boundaries and proposals from segments, and its losses. Times are shares of the video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import ShapeError
from .network import Maps
from .sampling import valid_cells

EPSILON = 1e-6
BOUNDARY = 3  # steps that a boundary covers
REGRESSION_WEIGHT = 10.0


class Labels(NamedTuple):
    """``start, end (B, T)``: the largest share of a step's anchor that a boundary covers. ``iou (B, T, T)``: of each proposal with
    its best action, 0 below the diagonal."""

    start: Tensor
    end: Tensor
    iou: Tensor


def segment_iou(a: Tensor, b: Tensor) -> Tensor:
    """``(n, m)`` intersection over union of segments ``(n, 2)`` and ``(m, 2)``; 0 where both are empty."""
    both = torch.minimum(a[:, None, 1], b[None, :, 1]) - torch.maximum(a[:, None, 0], b[None, :, 0])
    both = both.clamp(min=0)
    union = (a[:, 1] - a[:, 0])[:, None] + (b[:, 1] - b[:, 0])[None] - both
    return both / union.clamp(min=torch.finfo(union.dtype).tiny)


def cell_segments(steps: int) -> Tensor:
    """``(T, T, 2)``: cell ``[i, j]`` is ``[i / T, (j + 1) / T]``."""
    t = torch.arange(steps, dtype=torch.float64)
    return torch.stack([t[:, None].expand(-1, steps), (t[None] + 1).expand(steps, -1)], -1) / steps


def labels(segments: Sequence[Tensor], steps: int) -> Labels:
    """Labels of a batch.

    Args:
        segments: per video ``(k, 2)`` starts and ends; k may be 0.
        steps: T.

    Raises:
        ShapeError: segments of another shape, or an end before its start.
    """
    cells, valid = cell_segments(steps).flatten(0, 1), valid_cells(steps).flatten()
    anchors = (torch.arange(steps, dtype=torch.float64)[:, None] + torch.tensor([-0.5, 0.5])) / steps
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for one in segments:
        if one.dim() != 2 or one.shape[1] != 2 or bool((one[:, 1] < one[:, 0]).any()):
            raise ShapeError(
                f"segments have shape {tuple(one.shape)}: {one.tolist()}; expected (k, 2), start before end."
            )
        one = one.double()
        iou = torch.zeros(steps**2, dtype=torch.float64)
        start, end = torch.zeros(2, steps, dtype=torch.float64)
        if len(one):
            iou[valid] = segment_iou(cells[valid], one).amax(1)
            start, end = (_covered(anchors, side) for side in one.unbind(1))
        found.append((start, end, iou.view(steps, steps)))
    return Labels(*(torch.stack(part).float() for part in zip(*found, strict=True)))


def _covered(anchors: Tensor, boundary: Tensor) -> Tensor:
    half = BOUNDARY / len(anchors) / 2
    low = torch.maximum(anchors[:, None, 0], boundary[None] - half)
    high = torch.minimum(anchors[:, None, 1], boundary[None] + half)
    return ((high - low).clamp(min=0) * len(anchors)).amax(1)


def balanced(probability: Tensor, positive: Tensor) -> Tensor:
    """Binary cross-entropy in which positives and negatives weigh half each; a side without entries counts as one."""
    truths = positive.sum().clamp(min=1)
    falses = (~positive).sum().clamp(min=1)
    gain = positive / truths * (probability + EPSILON).log() + ~positive / falses * (1 - probability + EPSILON).log()
    return -0.5 * gain.sum()


def losses(maps: Maps, truth: Labels, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """``start``, ``end``, ``regression``, ``confidence`` and their weighted sum ``total``.

    The regression reads all proposals with IoU > 0.7 and as many, on average, with (0.3, 0.7] and with (0, 0.3].

    Args:
        generator: draws those; on the CPU.
    """
    valid = valid_cells(truth.iou.shape[-1]).to(truth.iou.device)
    iou = truth.iou
    high, middle = iou > 0.7, (iou > 0.3) & (iou <= 0.7)
    low = (iou > 0) & (iou <= 0.3) & valid
    draw = torch.rand(2, *iou.shape, generator=generator).to(iou.device)
    count = high.sum()
    read = (
        high | middle & (draw[0] < count / middle.sum().clamp(min=1)) | low & (draw[1] < count / low.sum().clamp(min=1))
    )
    square = ((maps.regression - iou).square() * read).sum() / read.sum().clamp(min=1)
    found = {
        "start": balanced(maps.start, truth.start > 0.5),
        "end": balanced(maps.end, truth.end > 0.5),
        "regression": 0.5 * square,
        "confidence": balanced(maps.confidence[:, valid], (iou > 0.9)[:, valid]),
    }
    weighted = found["start"] + found["end"] + REGRESSION_WEIGHT * found["regression"] + found["confidence"]
    return found | {"total": weighted}


def by_duration(maps: Tensor) -> Tensor:
    """``(…, T, T)`` at ``[start, end]`` as ``[duration − 1, start]``, the order of other ports; 0 where the end lies outside."""
    steps = maps.shape[-1]
    duration, start = torch.meshgrid(torch.arange(steps), torch.arange(steps), indexing="ij")
    end = duration + start
    return maps[..., start, end.clamp(max=steps - 1)] * (end < steps).to(maps)


def by_end(maps: Tensor) -> Tensor:
    """The inverse of :func:`by_duration`; 0 below the diagonal."""
    steps = maps.shape[-1]
    start, end = torch.meshgrid(torch.arange(steps), torch.arange(steps), indexing="ij")
    return maps[..., (end - start).clamp(min=0), start] * (end >= start).to(maps)
