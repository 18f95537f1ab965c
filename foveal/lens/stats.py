"""Sampling rows over position, and estimates with 95 % intervals.

Rows are drawn one per stratum of consecutive positions, so every part of the text is represented. The variance of a mean
is estimated from successive differences, ``(1 − f)·Σ (y_{i+1} − y_i)² / (2R(R − 1))`` for ``R`` equal strata (Wolter,
"Introduction to Variance Estimation", chapter 8): a trend over position is not mistaken for noise. When every row is drawn, ``f = 1`` and the
interval has no width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ConfigError

Z95 = 1.959963984540054
"""Half width of a 95 % interval in standard errors of a normal distribution."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure with its 95 % interval.

    Attributes:
        mean: the estimate, usually ``(H,)``.
        low, high: ends of the interval, same shape; equal to ``mean`` where the figure was computed from all rows.
    """

    mean: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Estimate:
        """A figure that was computed from all rows and so has no sampling error."""
        return cls(value, value, value)

    def to(self, device: torch.device | str) -> Estimate:
        """The same estimate on ``device``."""
        return Estimate(self.mean.to(device), self.low.to(device), self.high.to(device))


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows drawn from every sequence of a batch.

    Attributes:
        index: ``(B, R)`` int64 query rows, rising within a sequence.
        weight: ``(B, R)`` float64 share of all real rows that each drawn row stands for; sums to 1. A weight of 0 marks a
            stratum without rows (a sequence shorter than ``R``), whose index means nothing.
        fraction: ``(B,)`` float64 share of each sequence's real rows that was drawn.
    """

    index: Tensor
    weight: Tensor
    fraction: Tensor

    @property
    def drawn(self) -> int:
        """Number of rows drawn from the whole batch."""
        return int((self.weight > 0).sum())


def stratified_rows(real: Tensor, rows: int, seed: int) -> Rows:
    """Draw ``rows`` rows from a batch, one at random from each of equal strata of consecutive real rows.

    Args:
        real: ``(B, Nq)`` bool, False on rows that do not count (padding).
        rows: rows for the whole batch; each sequence gets ``ceil(rows / B)`` strata.
        seed: of the draw; the same seed, ``real`` and ``rows`` give the same rows.

    Raises:
        ConfigError: when ``rows`` is below 2, which leaves no way to tell an interval.
    """
    if rows < 2:
        raise ConfigError(f"rows is {rows}; expected at least 2 sampled rows, a few hundred for narrow intervals.")
    batch = real.shape[0]
    strata = min(-(-rows // batch), max(real.shape[1], 1))
    generator = torch.Generator().manual_seed(seed)
    total = max(int(real.sum()), 1)
    index, weight, fraction = [], [], []
    for b in range(batch):
        found = real[b].cpu().nonzero(as_tuple=True)[0]
        count = found.numel()
        edges = torch.arange(strata + 1) * count // strata
        size = edges.diff()
        draw = torch.rand(strata, generator=generator, dtype=torch.float64)
        pick = (edges[:-1] + (draw * size).long()).clamp(max=max(count - 1, 0))
        index.append(found[pick] if count else torch.zeros(strata, dtype=torch.long))
        weight.append(size.double() / total)
        fraction.append(int((size > 0).sum()) / max(count, 1))
    device = real.device
    return Rows(
        torch.stack(index).to(device),
        torch.stack(weight).to(device),
        torch.tensor(fraction, dtype=torch.float64, device=device),
    )


def stratified_mean(values: Tensor, rows: Rows, keep: Tensor | None = None) -> Estimate:
    """Mean over all real rows, with a 95 % interval.

    Args:
        values: ``(..., B, R)``, one value per drawn row; leading axes are independent figures.
        rows: where the values come from.
        keep: ``(..., B, R)`` or ``(B, R)`` bool; rows that do not count (the mean is then over the rows that do).

    Returns:
        An :class:`Estimate` of shape ``(...)``; NaN where no row counts.
    """
    stands_for = rows.weight.expand(values.shape)
    counts = stands_for > 0
    if keep is not None:
        counts = counts & keep
    y = torch.where(counts, values.double(), 0.0)
    total = (stands_for * counts).sum((-1, -2))  # 0/0 = NaN where nothing counts
    mean = (stands_for * y).sum((-1, -2)) / total
    residual = torch.where(counts, y - mean[..., None, None], 0.0)  # of the ratio: which rows count is random too
    strata = values.shape[-1]
    pairs = stands_for[..., 1:] * stands_for[..., :-1] * residual.diff(dim=-1).square()
    inflate = strata / max(strata - 1, 1)  # R strata give R − 1 differences
    variance = (0.5 * inflate * pairs.sum(-1) * (1 - rows.fraction).clamp(min=0)).sum(-1) / total.square()
    half = Z95 * variance.sqrt()
    return Estimate(mean, mean - half, mean + half)


def weighted_quantile(values: Tensor, rows: Rows, p: float, keep: Tensor | None = None) -> Estimate:
    """The smallest value that at least a share ``p`` of the rows does not exceed, with Woodruff's 95 % interval.

    The share of rows at or below the found value is a mean with an interval of its own (:func:`stratified_mean`); the
    interval runs between the quantiles at the ends of that one.

    Args:
        values: ``(..., B, R)``; rows and keep as in :func:`stratified_mean`.
        p: in [0, 1].
    """
    weight = rows.weight.expand(values.shape)
    if keep is not None:
        weight = weight * keep
    weight = (weight / weight.sum((-1, -2), keepdim=True)).flatten(-2)
    order = torch.argsort(values.flatten(-2), dim=-1, stable=True)
    value = values.flatten(-2).gather(-1, order).double()
    reached = weight.gather(-1, order).cumsum(-1)
    empty = weight.sum(-1).isnan()

    def at(share: Tensor) -> Tensor:
        share = share.clamp(0, 1)[..., None] - 1e-9  # sums of weights end in rounding errors
        found = torch.searchsorted(reached, share.contiguous()).clamp(max=value.shape[-1] - 1)
        return torch.where(empty, torch.nan, value.gather(-1, found).squeeze(-1))

    share = torch.full_like(weight[..., 0], p)
    middle = at(share)
    below = stratified_mean((values <= middle[..., None, None]).double(), rows, keep)
    half = torch.where(empty, 0.0, below.high - below.mean)
    return Estimate(middle, at(share - half), at(share + half))
