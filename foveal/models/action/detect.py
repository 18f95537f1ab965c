"""From BMN's maps to detections, and how good they are: soft-NMS, mAP at temporal IoU, average recall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import ShapeError
from ...core.precision import average_precision
from .network import Maps
from .sampling import valid_cells
from .targets import cell_segments, segment_iou

THUMOS = (0.3, 0.4, 0.5, 0.6, 0.7)


class Proposals(NamedTuple):
    """Per video, best first: ``segments (B, k, 2)`` as shares of the video and ``scores (B, k)``."""

    segments: Tensor
    scores: Tensor


def proposals(maps: Maps, keep: int = 100) -> Proposals:
    """Every proposal ``[i, j]`` that ends inside the video, scored start · end · confidence · regression, after soft-NMS."""
    steps = maps.start.shape[1]
    i, j = valid_cells(steps).nonzero().unbind(1)
    i, j = i[j + 1 < steps], j[j + 1 < steps]
    scores = maps.start[:, i] * maps.end[:, j + 1] * maps.confidence[:, i, j] * maps.regression[:, i, j]
    return soft_nms(cell_segments(steps)[i, j].to(scores), scores, keep)


def soft_nms(
    segments: Tensor, scores: Tensor, keep: int = 100, *, alpha: float = 0.4, low: float = 0.5, high: float = 0.9
) -> Proposals:
    """Gaussian soft-NMS: what overlaps a better proposal by more than ``low + (high − low) · its width`` is scaled by exp(−IoU² / α).

    Args:
        segments: ``(n, 2)``, the same for all videos. scores: ``(B, n)``. keep: at most so many.

    Raises:
        ShapeError: as many scores as segments are expected.
    """
    if segments.dim() != 2 or scores.dim() != 2 or segments.shape != (scores.shape[1], 2):
        raise ShapeError(
            f"segments has shape {tuple(segments.shape)} and scores {tuple(scores.shape)}; expected (n, 2) and (batch, n)."
        )
    overlap = segment_iou(segments, segments)
    limit = low + (high - low) * (segments[:, 1] - segments[:, 0])
    factor = torch.where(overlap > limit[:, None], (-overlap.square() / alpha).exp(), 1.0)  # row: the better one
    left, rows = scores.clone(), torch.arange(len(scores))
    chosen, kept = [], []
    for _ in range(min(keep, scores.shape[1])):
        value, best = left.max(1)
        chosen.append(best)
        kept.append(value)
        left = left * factor[best]
        left[rows, best] = -math.inf
    if not chosen:
        return Proposals(segments.new_zeros(len(scores), 0, 2), scores.new_zeros(len(scores), 0))
    return Proposals(segments[torch.stack(chosen, 1)], torch.stack(kept, 1))


class Detections(NamedTuple):
    """``video (n,)``, ``segment (n, 2)``, ``label (n,)`` and ``score (n,)``; truths leave the score out."""

    video: Tensor
    segment: Tensor
    label: Tensor
    score: Tensor


def classify(found: Proposals, classes: Tensor, top: int = 2) -> Detections:
    """Every proposal with each of its video's ``top`` classes: the score is proposal × class score ``(B, classes)``."""
    value, label = classes.topk(top, 1)
    batch, count = found.scores.shape
    score = found.scores[:, :, None] * value[:, None]
    video = torch.arange(batch)[:, None, None].expand_as(score)
    segment = found.segments[:, :, None].expand(-1, -1, top, -1)
    return Detections(
        video.flatten(), segment.flatten(0, 2), label[:, None].expand(batch, count, top).flatten(), score.flatten()
    )


def mean_average_precision(
    found: Detections, truth: Detections, thresholds: Sequence[float] = THUMOS
) -> dict[float, float]:
    """mAP at each temporal IoU: per class, best scores first, a detection takes the free truth of its video that it overlaps most,
    if at least by the threshold; the mean runs over classes that have truths.

    Raises:
        ShapeError: no truths at all.
    """
    if not len(truth.video):
        raise ShapeError("truth has no segments; expected at least one.")
    result: dict[float, list[float]] = {t: [] for t in thresholds}
    for c in truth.label.unique().tolist():
        mine, real = found.label == c, truth.label == c
        video, score = found.video[mine], found.score[mine]
        hits = {t: torch.zeros(len(video), dtype=torch.bool) for t in thresholds}
        for v in truth.video[real].unique().tolist():
            rows = (video == v).nonzero()[:, 0]
            rows = rows[score[rows].argsort(descending=True, stable=True)]
            overlap = segment_iou(found.segment[mine][rows], truth.segment[real & (truth.video == v)])
            for t in thresholds:
                hits[t][rows] = _taken(overlap, t)
        for t in thresholds:
            result[t].append(average_precision(score, hits[t], int(real.sum())))
    return {t: fmean(values) for t, values in result.items()}


def _taken(overlap: Tensor, threshold: float) -> Tensor:
    """``(n,)`` bool: which of the rows, in order, took a free column."""
    rows, free = overlap.tolist(), set(range(overlap.shape[1]))
    taken = torch.zeros(len(rows), dtype=torch.bool)
    for i, row in enumerate(rows):
        best = max(free, key=row.__getitem__, default=None)
        if best is None:
            break
        if row[best] >= threshold:
            taken[i] = True
            free.remove(best)
    return taken


def average_recall(
    found: Proposals, truth: Sequence[Tensor], count: int, thresholds: Sequence[float] = THUMOS
) -> float:
    """Share of the true segments, per video ``(k, 2)``, that one of the video's best ``count`` proposals overlaps by at least the
    threshold; mean over thresholds."""
    best = []
    for segments, one in zip(found.segments, truth, strict=True):
        if len(one):
            overlap = segment_iou(one.to(segments), segments[:count])
            best.append(overlap.amax(1) if overlap.shape[1] else overlap.new_zeros(len(one)))
    every = torch.cat(best)
    return fmean(float((every >= t).double().mean()) for t in thresholds)
