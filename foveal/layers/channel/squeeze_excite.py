"""Squeeze-and-excitation (arXiv 1709.01507) and the variants that ECA-Net (arXiv 1910.03151, table 2) compares it with.

SE: ω = σ(W2·ReLU(W1·y)) with y the mean over places. Without a bottleneck: Var1 σ(y), Var2 σ(w ⊙ y), Var3 σ(W·y), and GC, whose
W is block-diagonal. SE has no biases by default; timm's has.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.registry import register
from .base import ChannelAttention, Gate, Squeeze, apply_gate, at_least, bottleneck, gate_name, mean, one_of, pool


@register("channel", "se")
class SE(ChannelAttention):
    """Two dense layers with a bottleneck of C // r units; 2C²/r parameters.

    Args:
        channels: C. reduction: r. bias: of both layers. gate: last function.
        squeeze: ``"l2"`` pools √(Σ x² + ε) instead of the mean (the ablation of arXiv 2310.11198).
    """

    def __init__(
        self, channels: int, *, reduction: int = 16, bias: bool = False, squeeze: Squeeze = "mean", gate: Gate = "sigmoid"
    ) -> None:  # fmt: skip
        super().__init__(channels)
        layers = bottleneck(channels, reduction, bias, self)
        self.fc1, self.fc2 = layers[0], layers[2]
        self.squeeze: Squeeze = one_of("squeeze", squeeze, ("mean", "l2"), self)
        self.gate_function = gate_name(gate, self)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return apply_gate(self.fc2(self.fc1(pool(x, valid, self.squeeze)).relu()), self.gate_function)


@register("channel", "se_var1")
class SEVar1(ChannelAttention):
    """σ(y); no parameters. Equal to gather-excite θ−."""

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return mean(x, valid).sigmoid()


@register("channel", "se_var2")
class SEVar2(ChannelAttention):
    """σ(w ⊙ y); C parameters, 1 at first."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.weight = nn.Parameter(torch.ones(channels))

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return (self.weight * mean(x, valid)).sigmoid()


@register("channel", "se_var3")
class SEVar3(ChannelAttention):
    """σ(W·y) with a full matrix; C² parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.fc = nn.Linear(channels, channels, bias=False)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        return self.fc(mean(x, valid)).sigmoid()


@register("channel", "se_gc")
class SEGrouped(ChannelAttention):
    """σ(W·y) with W of G blocks; C²/G parameters. The paper's GC1 to GC3 have G = 16, C/16 and C/8.

    Raises:
        ConfigError: groups that do not divide the channels.
    """

    def __init__(self, channels: int, *, groups: int = 16) -> None:
        super().__init__(channels)
        if channels % at_least("groups", groups, 1, self):
            raise ConfigError(f"SEGrouped.groups is {groups}; expected a divisor of the {channels} channels.")
        width = channels // groups
        self.weight = nn.Parameter(torch.empty(groups, width, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        y = mean(x, valid).unflatten(1, (self.weight.shape[0], -1))
        return torch.einsum("goi,bgi->bgo", self.weight, y).flatten(1).sigmoid()
