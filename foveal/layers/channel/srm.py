"""Style-based recalibration (SRM, ICCV 2019): the gate reads mean and standard deviation of every channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.registry import register
from .base import ChannelAttention, Gate, apply_gate, bottleneck, deviation, gate_name, mean


@register("channel", "srm")
class SRM(ChannelAttention):
    """σ(BN(w_μ·mean + w_σ·std)) channel by channel, 4C parameters; with ``mlp`` a bottleneck over all 2C numbers.

    Args:
        channels: C. mlp: the crossed form (SRMcross). reduction: r of it, units 2C // r. gate: last function.

    Raises:
        ShapeError: (on call) one place, which has no deviation.
    """

    def __init__(self, channels: int, *, mlp: bool = False, reduction: int = 4, gate: Gate = "sigmoid") -> None:
        super().__init__(channels)
        self.style_integration: nn.Module
        if mlp:
            self.style_integration = nn.Sequential(
                nn.Flatten(), *bottleneck(channels, reduction, False, self, inputs=2 * channels)
            )
        else:
            self.style_integration = nn.Conv1d(channels, channels, 2, groups=channels, bias=False)
        self.bn = nn.BatchNorm1d(channels)
        self.gate_function = gate_name(gate, self)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        style = torch.stack([mean(x, valid), deviation(x, valid)], -1)  # (B, C, 2)
        return apply_gate(self.bn(self.style_integration(style).flatten(1)), self.gate_function)
