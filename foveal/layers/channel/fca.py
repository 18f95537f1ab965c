"""Frequency channel attention (FCA, ICCV 2021): squeeze-and-excitation whose pooling is one frequency of a cosine transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.errors import ConfigError
from ...core.registry import register
from .base import ChannelAttention, Gate, apply_gate, bottleneck, check_places, gate_name, places, wide


def cosine(length: int, freq: int) -> Tensor:
    """``(length,)`` float64: cos(πf(t + ½)/T)/√T, times √2 where f > 0; the rows f = 0 … T − 1 are orthonormal."""
    t = torch.arange(length, dtype=torch.float64)
    return torch.cos(math.pi * freq * (t + 0.5) / length) / math.sqrt(length) * (math.sqrt(2) if freq else 1.0)


@register("channel", "fca")
class FCA(ChannelAttention):
    """σ(MLP(Σ_t x·D_f)) with a fixed filter; 2C²/r parameters. Frequency 0 is √N times the mean.

    The filter is a buffer of ``(C, N)`` equal rows, so that weights saved elsewhere load.

    Args:
        channels: C. seq_len: places, one number per trailing axis. freq: f, one per axis. reduction: r. gate: last function.

    Raises:
        ConfigError: a frequency that the places do not have.
    """

    masks = False
    weight: Tensor

    def __init__(
        self,
        channels: int,
        *,
        seq_len: int | tuple[int, ...] | None = None,
        freq: int | tuple[int, ...] = 0,
        reduction: int = 4,
        gate: Gate = "sigmoid",
    ) -> None:
        super().__init__(channels)
        self.sizes = places(seq_len, self)
        wanted = (freq,) * len(self.sizes) if isinstance(freq, int) else tuple(freq)
        if len(wanted) != len(self.sizes) or not all(0 <= f < n for f, n in zip(wanted, self.sizes, strict=True)):
            raise ConfigError(f"FCA.freq is {freq}; expected frequencies from 0 to below the places {self.sizes}.")
        row = torch.ones(1, dtype=torch.float64)
        for n, f in zip(self.sizes, wanted, strict=True):
            row = torch.outer(row, cosine(n, f)).flatten()
        self.register_buffer("weight", row.float().expand(channels, -1).contiguous())
        self.fc = bottleneck(channels, reduction, False, self)
        self.gate_function = gate_name(gate, self)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        check_places(x, self.sizes, self)
        squeezed = (wide(x.flatten(2)) * self.weight).sum(-1)
        return apply_gate(self.fc(squeezed.to(x.dtype)), self.gate_function)
