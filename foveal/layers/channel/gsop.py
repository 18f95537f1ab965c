"""Global second-order pooling (GSoP, CVPR 2019) as in the EEG comparison (arXiv 2310.11198): the gate reads a covariance."""

from __future__ import annotations

from torch import Tensor, nn

from ...core.errors import ConfigError, ShapeError
from ...core.registry import register
from .base import ChannelAttention, Gate, apply_gate, at_least, gate_name, wide


@register("channel", "gsop")
class GSoP(ChannelAttention):
    """1×1 convolution C → c = C // r, covariance over places, normalisation of its rows, a convolution along each row
    (c → 4c), a dense layer 4c → C, and the gate.

    Args:
        channels: C. reduction: r. bias: of the three convolutions.
        gate: ``"sigmoid"`` as the paper's equation; the authors' code has ``"none"``, which leaves the gate unbounded.
    """

    def __init__(self, channels: int, *, reduction: int = 4, bias: bool = True, gate: Gate = "sigmoid") -> None:
        super().__init__(channels)
        c = channels // at_least("reduction", reduction, 1, self)
        if c < 1:
            raise ConfigError(
                f"GSoP.reduction is {reduction} and leaves {channels} // {reduction} = 0 channels; expected at most {channels}."
            )
        self.pw_conv1 = nn.Conv1d(channels, c, 1, bias=bias)
        self.bn = nn.BatchNorm1d(c)
        self.rw_conv = nn.Conv1d(c, 4 * c, c, groups=c, bias=bias)
        self.pw_conv2 = nn.Linear(4 * c, channels, bias=bias)
        self.gate_function = gate_name(gate, self)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if x[0, 0].numel() < 2:
            raise ShapeError(f"x has shape {tuple(x.shape)}: one place has no covariance; expected two places or more.")
        z = wide(self.pw_conv1(x.flatten(2)))  # (B, c, N)
        freedom: int | Tensor
        if valid is None:
            z, freedom = z - z.mean(-1, keepdim=True), z.shape[-1] - 1
        else:
            seen = valid.flatten(1)[:, None]
            count = seen.sum(-1, keepdim=True)
            z = z - z.masked_fill(~seen, 0).sum(-1, keepdim=True) / count.clamp(min=1)
            z, freedom = z.masked_fill(~seen, 0), (count - 1).clamp(min=1)
        covariance = (z @ z.mT / freedom).to(x.dtype)  # (B, c, c): rows are the normalisation's channels
        rows = self.rw_conv(self.bn(covariance))[..., 0]  # (B, 4c)
        return apply_gate(self.pw_conv2(rows), self.gate_function)
