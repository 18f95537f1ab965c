"""Train a small classifier as the EEG comparison does (arXiv 2310.11198): Adam, linear warm-up by epochs, cosine to zero, the last
epoch is the result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, DataError


def rate(epoch: int, epochs: int, warmup: int, start: Literal["step", "paper"] = "step") -> float:
    """Factor of the learning rate in an epoch.

    ``start="step"`` begins at 1/warmup; ``"paper"`` at 0, as the authors' code, whose first epoch moves only the statistics of
    normalisations.
    """
    if epoch < warmup:
        return (epoch + (start == "step")) / warmup
    return 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup)))


def standardise(
    train: Tensor, *others: Tensor, per: Literal["channel_time", "channel"] = "channel_time"
) -> tuple[Tensor, ...]:
    """Windows ``(n, E, T)`` shifted and scaled with the mean and deviation of the training ones.

    ``per="channel_time"`` takes statistics over trials for every channel and sample, as the authors' code does;
    ``"channel"`` over trials and samples.
    """
    if per not in ("channel_time", "channel"):
        raise ConfigError(f"standardise has per={per!r}; expected 'channel_time' or 'channel'.")
    axes = (0,) if per == "channel_time" else (0, 2)
    mean, deviation = train.mean(axes, keepdim=True), train.std(axes, keepdim=True, correction=0)
    return tuple((x - mean) / deviation.clamp(min=1e-8) for x in (train, *others))


def train_classifier(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    batch: int = 64,
    lr: float = 1e-3,
    warmup: int | None = None,
    start: Literal["step", "paper"] = "step",
    label_smoothing: float = 0.0,
    weight_decay: float = 0.0,
    seed: int = 0,
    after_epoch: Callable[[int], None] | None = None,
) -> list[float]:
    """Train in place by cross-entropy and leave the model in eval mode.

    Args:
        model: ``x`` to logits. x, y: training examples and their labels. epochs, batch, lr: as usual.
        warmup: epochs; default a fiftieth of all. start: see :func:`rate`. label_smoothing: of the loss.
        weight_decay: decoupled, as in AdamW. seed: of the order of examples and of dropout.
        after_epoch: called with the epoch, the model in eval mode, to follow held-out figures.

    Returns:
        Mean loss of every epoch.

    Raises:
        ConfigError: sizes below 1. DataError: a loss that is not finite.
    """
    if min(epochs, batch, len(x)) < 1 or len(x) != len(y):
        raise ConfigError(
            f"train_classifier has epochs={epochs}, batch={batch}, {len(x)} examples and {len(y)} labels; expected at least one of each and as many labels as examples."
        )
    warmup = max(1, epochs // 50) if warmup is None else warmup
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    order = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(epoch, epochs, warmup, start)
            total = 0.0
            for rows in torch.randperm(len(x), generator=order).split(batch):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows], label_smoothing=label_smoothing)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                total += float(loss.detach()) * len(rows)
            losses.append(total / len(x))
            if not math.isfinite(losses[-1]):
                raise DataError(f"the loss of epoch {epoch} is {losses[-1]}. Lower lr (now {lr}).")
            if after_epoch is not None:
                model.eval()
                after_epoch(epoch)
                model.train()
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch: int = 256) -> float:
    """Share of examples whose largest logit is their label; the model keeps its mode."""
    hits = [(model(a).argmax(-1) == b).sum() for a, b in zip(x.split(batch), y.split(batch), strict=True)]
    return float(torch.stack(hits).sum()) / len(x)
