"""MambAttention's front end and losses: waveform to compressed magnitude and phase, and back; the generator's loss.

Defaults are the paper's for 16 kHz. The adversarial metric loss is left out: it needs the PESQ of every clip in every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, mse_loss

from ...core.errors import ConfigError, ShapeError

WEIGHTS = {"magnitude": 0.9, "phase": 0.3, "complex": 0.1, "time": 0.2, "consistency": 0.1}
"""Of the losses; the paper's sixth, the metric loss, has 0.05."""
_LEAST = 1e-10


@dataclass(frozen=True)
class Codec:
    """``|Y|^c`` and the phase of a centred Hann spectrogram.

    Attributes:
        n_fft: samples of a window and of its transform, a multiple of 4. hop: samples between windows. power: c.
    """

    n_fft: int = 400
    hop: int = 100
    power: float = 0.3

    def __post_init__(self) -> None:
        if self.n_fft < 4 or self.n_fft % 4 or not 1 <= self.hop <= self.n_fft // 2 or not 0 < self.power <= 1:
            raise ConfigError(
                f"Codec has n_fft={self.n_fft}, hop={self.hop}, power={self.power}; expected a multiple of 4, a hop of at most half "
                "of it, and a power in (0, 1]."
            )

    def encode(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """``(|Y|^c, phase)``, ``(M, L // hop + 1, n_fft / 2 + 1)`` each, of waves ``(M, L)``.

        Raises:
            ShapeError: another number of axes, or a wave of at most half a window.
        """
        if wave.dim() != 2 or wave.shape[1] <= self.n_fft // 2:
            raise ShapeError(
                f"wave has shape {tuple(wave.shape)}; expected (batch, samples) with more than {self.n_fft // 2} samples."
            )
        spectrum = self._transform(wave)
        magnitude = (spectrum.real.square() + spectrum.imag.square() + _LEAST).sqrt()  # a finite gradient in silence
        return magnitude**self.power, torch.atan2(spectrum.imag + _LEAST, spectrum.real + _LEAST)

    def decode(self, magnitude: Tensor, phase: Tensor, length: int) -> Tensor:
        """Waves ``(M, length)``."""
        spectrum = torch.polar(magnitude.clamp(min=0) ** (1 / self.power), phase).mT
        window = torch.hann_window(self.n_fft, dtype=magnitude.dtype, device=magnitude.device)
        return torch.istft(spectrum, self.n_fft, self.hop, window=window, length=length)

    def _transform(self, wave: Tensor) -> Tensor:
        window = torch.hann_window(self.n_fft, dtype=wave.dtype, device=wave.device)
        return torch.stft(wave, self.n_fft, self.hop, window=window, return_complex=True).mT


def gain(noisy: Tensor) -> Tensor:
    """``(M, 1)`` factors that bring waves ``(M, L)`` to a mean square of 1; silence stays as it is."""
    power = noisy.square().mean(-1, keepdim=True)
    return torch.where(power > 0, power.clamp(min=torch.finfo(noisy.dtype).tiny).rsqrt(), torch.ones_like(power))


def anti_wrap(t: Tensor) -> Tensor:
    """``|t − 2π·round(t / 2π)|``, from 0 to π."""
    return (t - 2 * math.pi * torch.round(t / (2 * math.pi))).abs()


def phase_loss(estimate: Tensor, clean: Tensor) -> Tensor:
    """Phase, group delay (differences along frequency) and instantaneous frequency (along time) of ``(M, T, F)``.

    Differences count the first phase itself, as the authors' matrices do.
    """
    error = estimate - clean
    total = anti_wrap(error).mean()
    for axis in (1, 2):
        first = error.narrow(axis, 0, 1)
        total = total + anti_wrap(torch.diff(error, dim=axis, prepend=torch.zeros_like(first))).mean()
    return total


def generator_losses(codec: Codec, magnitude: Tensor, phase: Tensor, clean: Tensor) -> dict[str, Tensor]:
    """The five losses, unweighted, by the names of :data:`WEIGHTS`.

    Args:
        magnitude, phase: estimates ``(M, T, F)``. clean: waves ``(M, L)``, in the estimates' scale.
    """
    true_magnitude, true_phase = codec.encode(clean)
    wave = codec.decode(magnitude, phase, clean.shape[1])
    ours, theirs = _pair(magnitude, phase), _pair(true_magnitude, true_phase)
    return {
        "magnitude": mse_loss(magnitude, true_magnitude),
        "phase": phase_loss(phase, true_phase),
        "complex": 2 * mse_loss(ours, theirs),
        "time": l1_loss(wave, clean),
        "consistency": 2 * mse_loss(ours, _pair(*codec.encode(wave))),
    }


def si_sdr(estimate: Tensor, clean: Tensor) -> Tensor:
    """``(M,)`` scale-invariant signal-to-distortion ratio in dB of waves ``(M, L)``, without removing means."""
    scale = (estimate * clean).sum(-1, keepdim=True) / clean.square().sum(-1, keepdim=True).clamp(min=_LEAST)
    target = scale * clean
    return 10 * torch.log10(
        target.square().sum(-1).clamp(min=_LEAST) / (estimate - target).square().sum(-1).clamp(min=_LEAST)
    )


def _pair(magnitude: Tensor, phase: Tensor) -> Tensor:
    return torch.stack([magnitude * phase.cos(), magnitude * phase.sin()], -1)
