"""What Flux's routers are trained to (arXiv 2604.07394): a share of sparse layers per task, by multipliers that play against them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError


class Multipliers(nn.Module):
    """λ1 and λ2 of every task: ``λ1·|s − t| + λ2·(s − t)²``, raised by gradient ascent while the routers descend.

    Args:
        tasks: number of tasks. seed: both start uniform in (0, 0.5).
        signed: λ1 multiplies ``s − t`` instead of its size, a true Lagrange multiplier as in PruLong; otherwise both can only grow.
    """

    def __init__(self, tasks: int, *, signed: bool = False, seed: int = 0) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(seed)
        self.signed = signed
        self.linear = nn.Parameter(0.5 * torch.rand(tasks, generator=make))
        self.square = nn.Parameter(0.5 * torch.rand(tasks, generator=make))

    def forward(self, sparsity: Tensor, task: int, target: float) -> Tensor:
        """``(B,)`` penalties of samples of one task with these shares of sparse layers ``(B,)``."""
        off = sparsity - target
        return self.linear[task] * (off if self.signed else off.abs()) + self.square[task] * off**2


def sparsity(gates: Sequence[Tensor]) -> Tensor:
    """``(B,)`` share of sparse layers, s = 1 − mean over layers of r; gates: r ``(B,)`` of every layer."""
    return 1.0 - torch.stack(list(gates)).mean(0)


def temperature(step: float, steps: int, share: float = 0.6, high: float = 1.5) -> float:
    """τ: a cosine from ``high`` to 1 over the first ``⌈share·steps⌉`` steps, then 1."""
    decay = math.ceil(share * steps - 1e-9)
    if step >= decay:
        return 1.0
    return 1.0 + (high - 1.0) / 2 * (1.0 + math.cos(math.pi * step / decay))


def target_at(target: float, step: int, warmup: int) -> float:
    """A task's target, risen from 0 over ``warmup`` steps (0: at once)."""
    return target if step >= warmup else target * step / warmup


def rate_at(step: int, steps: int, share: float = 0.2) -> float:
    """Learning rate over its peak: linear over the first ``share`` of the steps, then a cosine to 0."""
    if not 0 <= share < 1:
        raise ConfigError(f"the share of warm-up steps is {share!r}; expected at least 0 and below 1.")
    warm = math.ceil(share * steps - 1e-9)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))
