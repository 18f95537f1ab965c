"""Events of a camera that reports changes of brightness: simulated from frames, and as the tensor that networks read.

A pixel sends an event whenever its log-intensity has moved by the threshold since its last one. The tensor is FE-LSD's event spike
tensor with a fixed linear kernel (arXiv 2211.07365, authors' code).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.errors import DataError, ShapeError

DARKEST = 1e-3


class Events(NamedTuple):
    """All ``(n,)``: time from 0 to 1 of the exposure, column, row, polarity (1 brighter, 0 darker) and the image it belongs to."""

    t: Tensor
    x: Tensor
    y: Tensor
    p: Tensor
    image: Tensor


def events_between(frames: Tensor, threshold: Tensor) -> Events:
    """Events of exposures given as frames at even times; log-intensity runs linearly between them.

    Args:
        frames: ``(B, S, H, W)`` linear intensities, S of at least 2. threshold: ``(B,)``, of the log-intensity.

    Raises:
        ShapeError: other shapes. DataError: a threshold that is not above 0.
    """
    if frames.dim() != 4 or frames.shape[1] < 2 or threshold.shape != frames.shape[:1]:
        raise ShapeError(
            f"frames has shape {tuple(frames.shape)} and threshold {tuple(threshold.shape)}; expected (B, S, H, W) with two frames or "
            "more, and (B,)."
        )
    if bool((threshold <= 0).any()):
        raise DataError(f"threshold is {threshold.tolist()}; expected numbers above 0.")
    level, threshold = frames.double().clamp(min=DARKEST).log(), threshold.double()
    step = threshold.view(-1, 1, 1)
    last, count = level[:, 0].clone(), frames.shape[1] - 1
    parts = []
    for s in range(count):
        before, after = level[:, s], level[:, s + 1]
        crossed = ((after - last) / step).trunc()
        crossed = crossed * (crossed * (after - before) > 0)  # rounding may put the last level a hair outside
        at = crossed.nonzero()
        where = at.unbind(1)
        number = crossed[where].abs().long()
        which = torch.arange(len(number)).repeat_interleave(number)  # a pixel may cross more than once
        k = torch.arange(len(which)) - (number.cumsum(0) - number)[which] + 1
        sign = crossed[where].sign()[which]
        image, y, x = (w[which] for w in where)
        value = last[image, y, x] + sign * k * threshold[image]
        share = ((value - before[image, y, x]) / (after - before)[image, y, x]).clamp(0, 1)
        parts.append(Events((s + share) / count, x, y, (sign > 0).long(), image))
        last = last + crossed * step
    return Events(*(torch.cat(column) for column in zip(*parts, strict=True)))


def events_to_est(
    t: Tensor,
    x: Tensor,
    y: Tensor,
    p: Tensor,
    shape: tuple[int, int],
    *,
    image: Tensor | None = None,
    images: int = 1,
    bins: int = 5,
    normalise: bool = True,
) -> Tensor:
    """``(images, 2 · bins, H, W)``, negative polarity first.

    With τ = (bins − 1)·t / t_max, an event adds (min(⌊τ⌋ + 1, bins − 1) − τ) to bin ⌊τ⌋ and (τ − ⌊τ⌋) to the next: as in the released
    code, the last event of an image weighs nothing, so that the mass is the number of events before it.

    Args:
        t: times from 0, the start of the exposure. x, y: columns and rows; what lies outside ``shape`` is dropped. p: 0 or 1.
        image: which image each event belongs to; default all to the first.
        normalise: divide each image by its largest entry; without events it stays zero.

    Raises:
        ShapeError: columns of different lengths. DataError: another polarity, or a time below 0.
    """
    t, x, y, p = (torch.as_tensor(c) for c in (t, x, y, p))
    image = torch.zeros(len(t), dtype=torch.long) if image is None else torch.as_tensor(image)
    if not t.shape == x.shape == y.shape == p.shape == image.shape or t.dim() != 1:
        raise ShapeError(
            f"t, x, y, p, image have shapes {[tuple(c.shape) for c in (t, x, y, p, image)]}; expected (n,) for all."
        )
    if bool(((p != 0) & (p != 1)).any()) or bool((t < 0).any()):
        raise DataError(
            "events have a polarity other than 0 and 1, or a time below 0; map −1 to 0 and start the exposure at 0."
        )
    longest = torch.zeros(images, dtype=torch.float64).scatter_reduce(0, image, t.double(), "amax")
    height, width = shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    t, x, y, p, image = (c[inside] for c in (t, x, y, p, image))
    x, y, p = x.long(), y.long(), p.long()
    tau = (bins - 1) * t.double() / longest[image].clamp(min=torch.finfo(torch.float64).tiny)
    low = tau.floor().long().clamp(max=bins - 1)
    high = (low + 1).clamp(max=bins - 1)
    out = torch.zeros(images, 2, bins, height, width, dtype=torch.float64)
    for at, weight in ((low, high - tau), (high, tau - low)):
        out.index_put_((image, p, at, y, x), weight, accumulate=True)
    if normalise:
        largest = out.flatten(1).amax(1).view(-1, 1, 1, 1, 1)
        out = out / largest.where(largest > 0, 1.0)
    return out.flatten(1, 2).float()
