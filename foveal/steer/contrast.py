"""CARVE's arithmetic: contrast of two attention maps, fusion over layers and steps, entropy, the best regulariser (arXiv 2509.06461)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError

Mode = Literal["start", "end", "full"]
"""Steps that are fused: the first, the last, or all with weights 1, 2, 3, …"""


def shares(maps: Tensor) -> Tensor:
    """Maps ``(..., N)`` divided by their sums over image tokens; a map of zeros stays."""
    total = maps.sum(-1, keepdim=True)
    return maps / torch.where(total > 0, total, 1.0)


def contrast(question: Tensor, general: Tensor, lam: float | Tensor) -> Tensor:
    """``A^Q / (A^G + λ)``, the only minimiser of ``Σ (Ã A^G − A^Q)² + λ Σ Ã² A^G``: maps of any one shape.

    Raises:
        ShapeError: maps of different shapes. ConfigError: λ below 0.
    """
    if question.shape != general.shape:
        raise ShapeError(
            f"question has shape {tuple(question.shape)} and general {tuple(general.shape)}; expected the same."
        )
    if float(torch.as_tensor(lam).min()) < 0:
        raise ConfigError(f"lam is {lam}; expected 0 or more.")
    return question / (general + lam)


def fuse(maps: Tensor, mode: Mode = "end") -> Tensor:
    """``(T, L, ...)`` contrasts → ``Σ_t w_t Σ_l``, ``w_t`` = 1 for one step, else t + 1."""
    if mode not in ("start", "end", "full"):
        raise ConfigError(f"mode is {mode!r}; expected 'start', 'end' or 'full'.")
    steps = {"start": maps[:1], "end": maps[-1:], "full": maps}[mode]
    weights = torch.arange(1, len(steps) + 1, dtype=maps.dtype, device=maps.device)
    return torch.tensordot(weights, steps.sum(1), 1)


def map_entropy(maps: Tensor) -> Tensor:
    """Entropy in nats of maps ``(..., N)`` renormalised over image tokens; at most ln N."""
    a = shares(maps)
    return -torch.special.xlogy(a, a).sum(-1)


def best_lambda(mean: float, deviation: float) -> float:
    """The λ that minimises ``λ²F²/(μ+λ)² + F²μ²σ²/(μ+λ)⁴``: the root of ``λ(μ+λ)² = 2μσ²`` (the paper prints half of it)."""
    low, high = 0.0, 2 * deviation**2 / mean
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (mean + middle) ** 2 < 2 * mean * deviation**2 else (low, middle)
    return (low + high) / 2


def default_layers(count: int) -> tuple[int, ...]:
    """Layers 20 to 25 of 28, scaled to ``count`` layers."""
    last = min(round(0.89 * count), count - 1)
    return tuple(range(min(round(0.71 * count), last), last + 1))


def saved(alpha: float) -> tuple[float, float]:
    """What the paper's two economies give when the map passes stop after the share ``alpha`` of the layers.

    Returns:
        Share of the three passes saved, ``2(1 − α)/3``; times fewer layers with the general map cached as well, ``3/(1 + α)``.
    """
    if not (0 < alpha <= 1 and math.isfinite(alpha)):
        raise ConfigError(f"alpha is {alpha}; expected above 0 to 1.")
    return 2 * (1 - alpha) / 3, 3 / (1 + alpha)
