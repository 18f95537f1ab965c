"""Context encoding (EncNet, CVPR 2018): the gate reads residuals to learned codewords."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.registry import register
from .base import ChannelAttention, Gate, apply_gate, at_least, gate_name, wide


@register("channel", "encnet")
class EncNet(ChannelAttention):
    """e_k = Σ_t softmax_k(s_k·‖x_t − d_k‖²)·(x_t − d_k); gate = σ(FC(mean_k ReLU(BN(e_k)))).

    The paper writes −s_k; here, as in the authors' code, the sign lies in the initial values, which are drawn from (−1, 0).

    Args:
        channels: C. codewords: K. gate: last function.
    """

    def __init__(self, channels: int, *, codewords: int = 4, gate: Gate = "sigmoid") -> None:
        super().__init__(channels)
        k = at_least("codewords", codewords, 1, self)
        self.codewords, self.smoothing = nn.Parameter(torch.empty(k, channels)), nn.Parameter(torch.empty(k))
        width = (k * channels) ** -0.5
        nn.init.uniform_(self.codewords, -width, width)
        nn.init.uniform_(self.smoothing, -1, 0)
        self.bn, self.fc = nn.BatchNorm1d(k), nn.Linear(channels, channels)
        self.gate_function = gate_name(gate, self)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        points = wide(x.flatten(2)).mT  # (B, N, C)
        words, smoothing = wide(self.codewords), wide(self.smoothing)
        # ‖x − d‖² = ‖x‖² − 2x·d + ‖d‖², so that no (B, N, K, C) is made
        square = points.square().sum(-1, keepdim=True) - 2 * points @ words.mT + words.square().sum(-1)
        share = torch.softmax(smoothing * square, -1)  # (B, N, K)
        if valid is not None:
            share = share * valid.flatten(1)[..., None]
        residual = share.mT @ points - share.sum(1)[..., None] * words  # (B, K, C)
        return apply_gate(self.fc(self.bn(residual.to(x.dtype)).relu().mean(1)), self.gate_function)
