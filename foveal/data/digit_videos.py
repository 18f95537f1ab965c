"""Untrimmed digit videos: real digits as frames, an action is a run of one class, and a recogniser's scores are the features.

Between actions stand frames of noise and of two digits at once. Beside the ten class scores are nuisance channels that rise and fall
like evidence and have nothing to do with the actions. Seeded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError
from .digits import digits

CLASSES, NUISANCE = 10, 30
PIXEL_NOISE = 0.7
SHORTEST, LONGEST, GAP, MOST_ACTIONS = 3, 9, 2, 3


@dataclass(frozen=True)
class Frames:
    """Pictures to make videos of, and who reads them.

    Attributes:
        pictures: ``(n, 64)``, sorted by class. first, count: ``(10,)``, where each class begins and how many it has.
        weight, bias: ``(10, 64)`` and ``(10,)``, of the recogniser, a logistic regression.
    """

    pictures: Tensor
    first: Tensor
    count: Tensor
    weight: Tensor
    bias: Tensor

    def draw(self, label: Tensor, generator: torch.Generator) -> Tensor:
        """A picture of every label ``(…)``: ``(…, 64)``."""
        share = torch.rand(label.shape, generator=generator)
        return self.pictures[self.first[label] + (share * self.count[label]).long()]

    def scores(self, pictures: Tensor) -> Tensor:
        """The recogniser's probabilities ``(…, 10)``."""
        return torch.softmax(pictures @ self.weight.mT + self.bias, -1)


@dataclass(frozen=True)
class DigitVideos:
    """A batch.

    Attributes:
        features: ``(n, 40, T)``; the first ten channels are class scores.
        segments: per video ``(k, 2)``, starts and ends as shares of the video. label: ``(n,)``, the class of the video's actions.
        action: ``(n, T)`` bool, steps inside an action.
    """

    features: Tensor
    segments: list[Tensor]
    label: Tensor
    action: Tensor


def frames(*, learnt: int = 500, held_out: int = 297, seed: int = 0) -> tuple[Frames, Frames]:
    """Pictures for training videos and for held-out ones, with one recogniser trained on ``learnt`` others.

    Raises:
        DataError: scikit-learn is missing, or the numbers leave nothing.
    """
    train, train_label, test, test_label = digits(held_out=held_out, seed=seed)
    if not CLASSES <= learnt < len(train):
        raise DataError(f"frames has learnt={learnt}; expected {CLASSES} to {len(train) - 1}.")
    from sklearn.linear_model import LogisticRegression

    g = torch.Generator().manual_seed(seed)
    shown = train[:learnt].flatten(1)
    shown = shown + PIXEL_NOISE * torch.randn(shown.shape, generator=g)
    model = LogisticRegression(max_iter=2000, C=0.1).fit(shown.double().numpy(), train_label[:learnt].numpy())
    weight, bias = (torch.from_numpy(a).float() for a in (model.coef_, model.intercept_))

    def sorted_by_class(pictures: Tensor, label: Tensor) -> Frames:
        count = torch.bincount(label, minlength=CLASSES)
        order = label.argsort(stable=True)
        return Frames(pictures.flatten(1)[order], count.cumsum(0) - count, count, weight, bias)

    return sorted_by_class(train[learnt:], train_label[learnt:]), sorted_by_class(test, test_label)


def digit_videos(count: int, source: Frames, generator: torch.Generator, *, steps: int = 32) -> DigitVideos:
    """Make videos.

    Args:
        count: how many. source: of the pictures. generator: on the CPU. steps: T; the last one is never part of an action.

    Raises:
        ConfigError: no video, or fewer steps than the longest action needs.
    """
    if count < 1 or steps < LONGEST + GAP:
        raise ConfigError(
            f"digit_videos has count={count}, steps={steps}; expected at least one video and {LONGEST + GAP} steps."
        )
    action = torch.zeros(count, steps, dtype=torch.bool)
    segments = []
    for i in range(count):
        runs = _runs(steps - 1, generator)
        segments.append(torch.tensor(runs) / steps)
        for a, b in runs:
            action[i, a:b] = True
    label = torch.randint(CLASSES, (count,), generator=generator)
    first = torch.randint(CLASSES, (count, steps), generator=generator)
    second = (first + torch.randint(1, CLASSES, (count, steps), generator=generator)) % CLASSES
    mixed = (source.draw(first, generator) + source.draw(second, generator)) / 2
    empty = torch.rand(count, steps, 1, generator=generator) < 0.5
    background = torch.where(empty, -torch.ones(()), mixed)
    pictures = torch.where(action[..., None], source.draw(label[:, None].expand(-1, steps), generator), background)
    pictures = pictures + PIXEL_NOISE * torch.randn(pictures.shape, generator=generator)
    features = torch.cat([source.scores(pictures).mT, nuisance(count, steps, generator)], 1)
    return DigitVideos(features, segments, label, action)


def nuisance(count: int, steps: int, generator: torch.Generator) -> Tensor:
    """``(count, 30, T)`` from 0 to 1: two pulses a channel, as long as actions and anywhere, under noise."""
    shape = (count, NUISANCE, 2, 1)
    length = torch.randint(SHORTEST, LONGEST + 1, shape, generator=generator)
    start = torch.randint(-SHORTEST, steps, shape, generator=generator)
    height = 0.5 + 0.5 * torch.rand(shape, generator=generator)
    t = torch.arange(steps)
    pulses = (height * ((t >= start) & (t < start + length))).amax(2)
    return (pulses + 0.15 * torch.randn(pulses.shape, generator=generator)).clamp(0, 1)


def _runs(steps: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """One to three runs inside ``steps``, at least ``GAP`` apart; fewer where they do not fit."""
    lengths = torch.randint(SHORTEST, LONGEST + 1, (MOST_ACTIONS,), generator=generator).tolist()
    lengths = lengths[: int(torch.randint(1, MOST_ACTIONS + 1, (), generator=generator))]
    while sum(lengths) + GAP * (len(lengths) - 1) > steps:
        lengths.pop()
    free = steps - sum(lengths) - GAP * (len(lengths) - 1)
    cuts = torch.randint(free + 1, (len(lengths),), generator=generator).sort().values.tolist()
    runs, used = [], 0
    for k, (cut, length) in enumerate(zip(cuts, lengths, strict=True)):
        start = cut + used + GAP * k
        runs.append((start, start + length))
        used += length
    return runs
