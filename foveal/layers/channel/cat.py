"""Collaborating channel and place attention (CAT, IET Computer Vision 2023) as released for EEG, and CATLite, its channel half.

Released form (arXiv 2310.11198), which differs from the paper: the two gates are mixed by a softmax, the mean over channels
enters with a minus sign, the blurred maximum is taken over places, and CATLite ends in a sigmoid. Entropies come from a
log-softmax, and a range of zero normalises to zero, where the released code divides 0/0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...core.registry import register
from .base import ChannelAttention, bottleneck, mean, wide
from .cbam import places_convolution


def entropy(x: Tensor, axis: int) -> Tensor:
    """Entropy in nats of the softmax along one axis, which is kept with length one."""
    logs = torch.log_softmax(wide(x), axis)
    return -(logs.exp() * logs).sum(axis, keepdim=True)


def to_unit(x: Tensor, axis: int, smallest: float = 1e-6) -> Tensor:
    """``x`` scaled to [0, 1] along an axis; zero where the range is below ``smallest``."""
    low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
    wide_enough = high - low > smallest
    return torch.where(wide_enough, (x - low) / torch.where(wide_enough, high - low, 1.0), 0.0)


class Blur(nn.Module):
    """A fixed 5-tap Gaussian (σ = 1, normalised) along every trailing axis, zeros outside."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.exp(-0.5 * torch.arange(-2.0, 3.0).square())
        self.register_buffer("weight", (taps / taps.sum()).view(1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        for axis in range(2, x.dim()):
            line = x.movedim(axis, -1)
            smooth = nn.functional.conv1d(line.reshape(-1, 1, line.shape[-1]), self.weight.to(x.dtype), padding=2)
            x = smooth.reshape(line.shape).movedim(-1, axis)
        return x


class _Mixed(ChannelAttention):
    """The channel half: σ(α·MLP(mean) + β·MLP(max of the blurred) + γ·MLP(entropy)); α = β = γ = 0 at first."""

    masks = False

    def __init__(self, channels: int, reduction: int, bias: bool) -> None:
        super().__init__(channels)
        self.gauss_filter = Blur()
        self.mlp = bottleneck(channels, reduction, bias, self)
        self.c_alpha, self.c_beta, self.c_gamma = (nn.Parameter(torch.zeros(1)) for _ in range(3))

    def channel_gate(self, x: Tensor, highest: Tensor) -> Tensor:
        """``(B, C)`` from ``x`` and the maxima ``(B, C)`` of its blurred form."""
        disorder = to_unit(entropy(x.flatten(2), -1)[..., 0], 1).to(x.dtype)
        parts = self.mlp(torch.stack([mean(x), highest, disorder]))  # (3, B, C)
        shares = torch.cat([self.c_alpha, self.c_beta, self.c_gamma])
        return (shares[:, None, None] * parts).sum(0).sigmoid()


@register("channel", "catlite")
class CATLite(_Mixed):
    """The channel half of CAT, whose bottleneck has biases.

    Args:
        channels: C. reduction: r. bias: of the bottleneck.
    """

    def __init__(self, channels: int, *, reduction: int = 4, bias: bool = True) -> None:
        super().__init__(channels, reduction, bias)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.channel_gate(x, self.gauss_filter(x).flatten(2).amax(-1))


@register("channel", "cat")
class CAT(_Mixed):
    """w_c·channel half + w_s·σ(Conv(−α·mean_c + β·max_t of the blurred + γ·entropy_c)), with w the softmax of two numbers.

    Args:
        channels: C. reduction: r. kernel_size: of the C → C convolution over places. ndim: trailing axes, 1 or 2.
        bias: of bottleneck and convolution.
    """

    def __init__(
        self, channels: int, *, reduction: int = 4, kernel_size: int = 3, ndim: Literal[1, 2] = 1, bias: bool = False
    ) -> None:
        super().__init__(channels, reduction, bias)
        self.ndim = ndim
        self.conv = places_convolution(ndim, channels, channels, kernel_size, bias, self)
        self.s_alpha, self.s_beta, self.s_gamma = (nn.Parameter(torch.zeros(1)) for _ in range(3))
        self.c_w, self.s_w = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        highest = self.gauss_filter(x).flatten(2).amax(-1)
        ones = (1,) * (x.dim() - 2)
        disorder = to_unit(entropy(x, 1).flatten(2), -1).view(x.shape[0], 1, *x.shape[2:]).to(x.dtype)
        mixed = (
            -self.s_alpha * x.mean(1, keepdim=True)
            + self.s_beta * highest.view(*x.shape[:2], *ones)
            + self.s_gamma * disorder
        )
        place_gate = self.conv(mixed).sigmoid()
        share = torch.softmax(torch.cat([self.c_w, self.s_w]), 0)
        return share[0] * self.channel_gate(x, highest).view(*x.shape[:2], *ones) + share[1] * place_gate
