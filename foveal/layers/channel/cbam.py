"""Convolutional block attention (CBAM, arXiv 1807.06521): a gate over channels, then one over places."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.registry import register
from .base import ChannelAttention, bottleneck, mean, odd


def places_convolution(
    ndim: int, inputs: int, outputs: int, kernel_size: int, bias: bool, where: nn.Module
) -> nn.Module:
    """A convolution over one or two trailing axes that keeps their sizes.

    Raises:
        ConfigError: another number of axes, or an even kernel.
    """
    if ndim not in (1, 2):
        raise ConfigError(f"{type(where).__name__}.ndim is {ndim!r}; expected 1 for (B, C, T) or 2 for (B, C, H, W).")
    kind = nn.Conv1d if ndim == 1 else nn.Conv2d
    return kind(inputs, outputs, odd(kernel_size, where), padding=kernel_size // 2, bias=bias)


@register("channel", "cbam")
class CBAM(ChannelAttention):
    """Channel gate σ(MLP(mean) + MLP(max)); then, on the gated input, σ(Conv[mean over channels; max over channels]).

    Args:
        channels: C. reduction: r. kernel_size: of the convolution over places. ndim: trailing axes, 1 or 2.
        norm: a batch normalisation in place of the convolution's bias, as the original CBAM and timm have it for images.
    """

    masks = False

    def __init__(
        self, channels: int, *, reduction: int = 16, kernel_size: int = 7, ndim: Literal[1, 2] = 1, norm: bool = False
    ) -> None:
        super().__init__(channels)
        self.ndim = ndim
        self.fc = bottleneck(channels, reduction, False, self)
        self.conv = places_convolution(ndim, 2, 1, kernel_size, not norm, self)
        self.bn = (nn.BatchNorm1d(1) if ndim == 1 else nn.BatchNorm2d(1)) if norm else nn.Identity()

    def channel_gate(self, x: Tensor) -> Tensor:
        """``(B, C)``: the first gate alone."""
        return (self.fc(mean(x)) + self.fc(x.flatten(2).amax(-1))).sigmoid()

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        first = self.channel_gate(x).view(*x.shape[:2], *(1,) * (x.dim() - 2))
        gated = x * first.to(x.dtype)
        both = torch.cat([gated.mean(1, keepdim=True), gated.amax(1, keepdim=True)], 1)
        return first * self.bn(self.conv(both)).sigmoid()
