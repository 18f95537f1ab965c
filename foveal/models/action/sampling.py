"""BMN's boundary-matching sampling: every proposal's features are fixed mixtures of time steps.

The proposal of cell ``[i, j]``, i ≤ j, runs from step i to j + 1. With ℓ = j + 2 − i, 3N points lie evenly on
``[i − ℓ/2, j + 1 + ℓ/2]``, ends included; each spreads linearly on its two neighbouring steps, and groups of three are averaged.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...core.errors import ConfigError

Mode = Literal["symmetric", "reference"]
PER_BIN = 3


def valid_cells(steps: int) -> Tensor:
    """``(T, T)`` bool, True where the start does not come after the end."""
    return torch.ones(steps, steps, dtype=torch.bool).triu()


def sample_points(steps: int, samples: int) -> Tensor:
    """``(cells, samples, 3)`` float64 positions in steps, of the valid cells in row order."""
    start, end = valid_cells(steps).nonzero().double().unbind(1)
    span = end + 2 - start
    share = torch.linspace(0, 1, PER_BIN * samples, dtype=torch.float64)
    low, high = start - span / 2, end + 1 + span / 2
    return (low[:, None] + (high - low)[:, None] * share).unflatten(1, (samples, PER_BIN))


def sampling_weights(steps: int, samples: int, mode: Mode = "symmetric") -> Tensor:
    """Weights ``(samples, T, cells)`` float32 of the valid cells, in row order.

    Args:
        steps: T. samples: N, per proposal.
        mode: what lies outside the steps is dropped on both sides; ``"reference"`` gives points between −1 and 0 to step 0 in full, as
            the public reimplementation does.

    Raises:
        ConfigError: sizes below 1 or an unknown mode.
    """
    if steps < 1 or samples < 1 or mode not in ("symmetric", "reference"):
        raise ConfigError(
            f"sampling has steps={steps}, samples={samples}, mode={mode!r}; expected at least 1 of each, and 'symmetric' or 'reference'."
        )
    points = sample_points(steps, samples)
    if mode == "reference":
        points = points.where((points <= -1) | (points >= 0), 0.0)
    grid = torch.arange(steps, dtype=torch.float64)
    total = torch.zeros(points.shape[0], samples, steps, dtype=torch.float64)
    for k in range(PER_BIN):  # a hat around each point
        total += (1 - (points[:, :, k, None] - grid).abs()).clamp(min=0)
    return (total / PER_BIN).permute(1, 2, 0).float().contiguous()
