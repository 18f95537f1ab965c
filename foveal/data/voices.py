"""Synthetic voices and noises: harmonics under moving formants with syllables, and five kinds of noise, seeded."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError

RATE = 8000
NOISES = ("white", "rumble", "hum", "clicks", "babble")
Noise = Literal["white", "rumble", "hum", "clicks", "babble"]
VOWELS = torch.tensor([[700.0, 1200, 2500], [400, 2000, 2600], [300, 800, 2300], [500, 1500, 2400], [600, 1000, 2600]])


def voices(count: int, samples: int, generator: torch.Generator, *, pitch: float = 120.0, tract: float = 1.0) -> Tensor:
    """``(count, samples)`` vowel-like syllables of one speaker at 8 kHz, of mean square 1.

    Args:
        pitch: of the voice in Hz; it wanders by a tenth. tract: factor of the formants, about 0.85 to 1.2 between speakers.

    Raises:
        ConfigError: sizes below 1, or a pitch that the rate cannot carry.
    """
    if min(count, samples) < 1 or not 20 <= pitch <= RATE / 4 or tract <= 0:
        raise ConfigError(
            f"voices has count={count}, samples={samples}, pitch={pitch}, tract={tract}; expected sizes of at least 1, a pitch from 20 "
            f"to {RATE // 4} Hz and a tract above 0."
        )
    steps = max(2, math.ceil(samples / RATE * 5))  # five syllables a second
    syllable = torch.randint(len(VOWELS), (count, steps), generator=generator)
    formants = _smooth(tract * VOWELS[syllable].mT, samples)  # (count, 3, samples)
    wander = _smooth(torch.randn(count, 1, 2 * steps, generator=generator), samples)[:, 0]
    frequency = pitch * (1 + 0.1 * wander.clamp(-2, 2))
    phase = 2 * math.pi * frequency.cumsum(-1) / RATE
    loud = _smooth(torch.rand(count, 1, 3 * steps, generator=generator), samples)[:, 0] ** 2
    wave = torch.zeros(count, samples)
    for k in range(1, int(RATE / 2 / pitch)):
        place = (k * frequency)[:, None]
        shape = torch.exp(-(((place - formants) / 150) ** 2)).sum(1) + 0.05
        wave += (place[:, 0] < RATE / 2) * shape / k**0.5 * torch.sin(k * phase)
    return _unit(wave * loud)


def noise(kind: Noise, count: int, samples: int, generator: torch.Generator) -> Tensor:
    """``(count, samples)`` of mean square 1.

    ``"rumble"`` falls with frequency, ``"hum"`` is a chord of steady tones, ``"clicks"`` short bursts, ``"babble"`` six voices at once.

    Raises:
        ConfigError: an unknown kind.
    """
    if kind not in NOISES:
        raise ConfigError(f"noise kind is {kind!r}; expected one of {', '.join(NOISES)}.")
    if kind == "babble":
        total = torch.zeros(count, samples)
        for _ in range(6):
            pitch, tract = torch.rand(2, generator=generator).tolist()
            total += voices(count, samples, generator, pitch=90 + 140 * pitch, tract=0.85 + 0.35 * tract)
        return _unit(total)
    white = torch.randn(count, samples, generator=generator)
    if kind == "rumble":
        spectrum = torch.fft.rfft(white)
        white = torch.fft.irfft(spectrum / torch.arange(1, spectrum.shape[-1] + 1).sqrt(), n=samples)
    elif kind == "hum":
        tones = 50 + 1500 * torch.rand(count, 8, 1, generator=generator)
        turn = 2 * math.pi * torch.rand(count, 8, 1, generator=generator)
        white = torch.sin(2 * math.pi * tones * torch.arange(samples) / RATE + turn).sum(1) + 0.1 * white
    elif kind == "clicks":
        hits = (torch.rand(count, samples, generator=generator) < 20 / RATE).float()
        decay = torch.exp(-torch.arange(80) / 20.0)
        tail = torch.nn.functional.conv1d(hits[:, None], decay.flip(0)[None, None], padding=79)[:, 0, :samples]
        white = white * (tail + 0.02)
    return _unit(white)


def mixed(clean: Tensor, disturbance: Tensor, snr: Tensor) -> Tensor:
    """``clean + noise`` ``(n, samples)`` at ``snr`` ``(n,)`` dB, for parts of mean square 1."""
    return clean + disturbance * 10 ** (-snr[:, None] / 20)


def _smooth(points: Tensor, samples: int) -> Tensor:
    return torch.nn.functional.interpolate(points, size=samples, mode="linear", align_corners=True)


def _unit(wave: Tensor) -> Tensor:
    return wave / wave.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-8)
