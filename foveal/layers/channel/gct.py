"""Gated channel transformation (GCT, CVPR 2020): channels compete by their energy; the identity at first."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.registry import register
from .base import ChannelAttention, Squeeze, energy, mean, one_of


@register("channel", "gct")
class GCT(ChannelAttention):
    """1 + tanh(γ·ŝ + β) with s = α·√(Σ_t x² + ε) and ŝ = s/√(mean_c s² + ε); 3C parameters, α = 1 and β = γ = 0 at first.

    Args:
        channels: C. epsilon: ε.
        squeeze: ``"mean"`` pools the mean instead of the energy (an ablation of arXiv 2310.11198).
    """

    def __init__(self, channels: int, *, squeeze: Squeeze = "l2", epsilon: float = 1e-5) -> None:
        super().__init__(channels)
        self.alpha = nn.Parameter(torch.ones(channels))
        self.beta, self.gamma = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))
        self.squeeze: Squeeze = one_of("squeeze", squeeze, ("mean", "l2"), self)
        self.epsilon = epsilon

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        s = self.alpha * (energy(x, valid, self.epsilon) if self.squeeze == "l2" else mean(x, valid))
        normalised = s * (s.square().mean(1, keepdim=True) + self.epsilon).rsqrt()
        return 1 + torch.tanh(self.gamma * normalised + self.beta)
