"""MambAttention's network: encoder, hybrid blocks, a magnitude decoder and a phase decoder, as in the authors' code.

Input is the compressed magnitude |Y|^c and the phase of a noisy spectrogram, output the estimates of both for clean speech.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError, ShapeError
from ...layers.time_frequency import MambAttentionBlock


def _unit(conv: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(conv, nn.InstanceNorm2d(channels, affine=True), nn.PReLU(channels))


class DilatedDense(nn.Module):
    """Layer i convolves all earlier outputs 3×3 with dilation ``2^i`` along time; the last layer's channels come out."""

    def __init__(self, channels: int, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _unit(
                nn.Conv2d(channels * (i + 1), channels, 3, dilation=(2**i, 1), padding=(2**i, 1)),
                channels,
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = out = x
        for layer in self.layers:
            out = layer(seen)
            seen = torch.cat([out, seen], 1)
        return out


class Mask(nn.Module):
    """``β σ(s_f m)``, one learned slope per frequency bin, for ``(M, T, F)``."""

    def __init__(self, bins: int, beta: float = 2.0) -> None:
        super().__init__()
        self.beta, self.slope = beta, nn.Parameter(torch.ones(bins))

    def forward(self, x: Tensor) -> Tensor:
        return self.beta * torch.sigmoid(self.slope * x)


class MambAttention(nn.Module):
    """The enhancer's network: ``(M, T, F)`` compressed magnitude and phase in, estimates of both out.

    Offline: instance norms, attention and the backward mixers see the whole utterance.

    Args:
        channels: K. blocks: R. bins: F, odd (``n_fft / 2 + 1``).
        block: options of :class:`MambAttentionBlock`, such as ``{"attention": "separate"}``.

    Raises:
        ConfigError: ``bins`` that the stride of 2 cannot restore.
    """

    def __init__(
        self, channels: int = 64, blocks: int = 4, bins: int = 201, block: dict[str, object] | None = None
    ) -> None:
        super().__init__()
        if bins < 3 or bins % 2 == 0:
            raise ConfigError(
                f"MambAttention.bins is {bins}; expected an odd number from 3, as n_fft / 2 + 1 is for n_fft a multiple of 4."
            )
        k = channels
        self.bins = bins
        self.encoder = nn.Sequential(
            _unit(nn.Conv2d(2, k, 1), k), DilatedDense(k), _unit(nn.Conv2d(k, k, (1, 3), stride=(1, 2)), k)
        )
        self.blocks = nn.Sequential(*(MambAttentionBlock(k, **(block or {})) for _ in range(blocks)))  # type: ignore[arg-type]
        self.magnitude = nn.Sequential(
            DilatedDense(k), nn.ConvTranspose2d(k, k, (1, 3), stride=(1, 2)), _unit(nn.Conv2d(k, 1, 1), 1), nn.Conv2d(1, 1, 1)
        )  # fmt: skip
        self.mask = Mask(bins)
        self.phase = nn.Sequential(DilatedDense(k), _unit(nn.ConvTranspose2d(k, k, (1, 3), stride=(1, 2)), k))
        self.parts = nn.ModuleList(nn.Conv2d(k, 1, 1) for _ in range(2))

    def forward(self, magnitude: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
        """``(|X̂|^c, phase of X̂)``, each ``(M, T, F)``.

        Raises:
            ShapeError: inputs of other or unequal shapes.
        """
        if magnitude.dim() != 3 or magnitude.shape[-1] != self.bins or magnitude.shape != phase.shape:
            raise ShapeError(
                f"magnitude has shape {tuple(magnitude.shape)} and phase {tuple(phase.shape)}; expected (batch, frames, {self.bins}) for both."
            )
        mask, out_phase = self.decode(torch.stack([magnitude, phase], 1))
        return mask * magnitude, out_phase

    def decode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitude mask in (0, 2) and phase, ``(M, T, F)``, of stacked inputs ``(M, 2, T, F)``."""
        x = self.blocks(self.encoder(x))
        mask = self.mask(self.magnitude(x)[:, 0])
        wave = self.phase(x)
        real, imaginary = (part(wave)[:, 0] for part in self.parts)
        return mask, torch.atan2(imaginary, real)
