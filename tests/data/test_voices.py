"""Synthetic voices and noises: seeded, of one power, and with the pitch that was asked for."""

from __future__ import annotations

import pytest
import torch

from foveal.core.errors import ConfigError
from foveal.data.voices import NOISES, RATE, mixed, noise, voices


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("pitch", [100.0, 200.0])
def test_voices_repeat_at_their_pitch(pitch):
    x = voices(4, 4000, generator(), pitch=pitch)
    assert x.shape == (4, 4000)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(4))
    spectrum = torch.fft.rfft(x, n=2 * 4000).abs().square()
    echo = torch.fft.irfft(spectrum)[:, : RATE // 60].mean(0)
    shortest = int(RATE / 400)
    best = shortest + int(echo[shortest:].argmax())
    assert best == pytest.approx(RATE / pitch, rel=0.25)
    assert torch.equal(x, voices(4, 4000, generator(), pitch=pitch))


@pytest.mark.parametrize("kind", NOISES)
def test_noises_have_unit_power_and_differ(kind):
    x = noise(kind, 3, 2001, generator())
    assert x.shape == (3, 2001) and bool(torch.isfinite(x).all())
    torch.testing.assert_close(x.square().mean(-1), torch.ones(3))
    assert float((x[0] - x[1]).abs().max()) > 0.1


def test_mixtures_have_the_ratio_asked_for():
    clean, disturbance = voices(2, 1000, generator()), noise("white", 2, 1000, generator(1))
    snr = torch.tensor([0.0, 10.0])
    rest = mixed(clean, disturbance, snr) - clean
    torch.testing.assert_close(
        10 * torch.log10(clean.square().mean(-1) / rest.square().mean(-1)), snr, atol=1e-3, rtol=0
    )


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="pitch=5"):
        voices(1, 100, generator(), pitch=5)
    with pytest.raises(ConfigError, match="noise kind is 'sea'"):
        noise("sea", 1, 100, generator())  # type: ignore[arg-type]
