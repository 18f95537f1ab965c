"""MambAttention's front end and losses: identities of the paper's description."""

from __future__ import annotations

import math

import pytest
import torch

from foveal.core.errors import ConfigError, ShapeError
from foveal.models.mambattention.codec import WEIGHTS, Codec, anti_wrap, gain, generator_losses, phase_loss, si_sdr


def wave(batch: int = 2, samples: int = 1200, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, samples, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("codec", [Codec(), Codec(128, 64), Codec(128, 32, power=1.0)])
@pytest.mark.parametrize("samples", [1200, 1279])
def test_decode_of_encode_is_the_waveform(codec, samples):
    x = wave(samples=samples)
    magnitude, phase = codec.encode(x)
    assert magnitude.shape == phase.shape == (2, samples // codec.hop + 1, codec.n_fft // 2 + 1)
    torch.testing.assert_close(codec.decode(magnitude, phase, samples), x, atol=1e-4, rtol=0)


def test_losses_of_the_clean_wave_are_zero():
    codec, x = Codec(128, 64), wave()
    found = generator_losses(codec, *codec.encode(x), x)
    assert set(found) == set(WEIGHTS)
    assert all(float(v) < 1e-4 for v in found.values())
    magnitude, phase = codec.encode(x)
    worse = generator_losses(codec, magnitude * 1.1, phase + 0.3, x)
    assert all(float(worse[k]) > float(found[k]) for k in found)


def test_losses_have_finite_gradients_in_silence():
    codec, x = Codec(128, 64), torch.zeros(1, 640)
    magnitude, phase = (t.requires_grad_() for t in codec.encode(x))
    torch.stack(list(generator_losses(codec, magnitude, phase, x).values())).sum().backward()
    assert bool(torch.isfinite(magnitude.grad).all() and torch.isfinite(phase.grad).all())


def test_anti_wrap_is_even_periodic_and_at_most_pi():
    t = torch.linspace(-20, 20, 401, dtype=torch.float64)
    torch.testing.assert_close(anti_wrap(t), anti_wrap(-t))
    torch.testing.assert_close(anti_wrap(t), anti_wrap(t + 2 * math.pi), atol=1e-9, rtol=0)
    assert float(anti_wrap(t).min()) >= 0 and float(anti_wrap(t).max()) <= math.pi + 1e-12


def test_phase_loss_is_zero_for_whole_turns_and_counts_the_first_phase():
    phase = torch.rand(1, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turns = 2 * math.pi * torch.randint(-2, 3, (1, 5, 4), generator=torch.Generator().manual_seed(1)).double()
    assert float(phase_loss(phase + turns, phase)) < 1e-9
    constant = float(phase_loss(phase + 0.5, phase))  # differences vanish except the first
    assert constant == pytest.approx(0.5 + 0.5 / 5 + 0.5 / 4)


def test_gain_undoes_scale_and_leaves_silence():
    x = wave()
    torch.testing.assert_close(gain(x) * x, gain(3 * x) * (3 * x))
    assert float(gain(torch.zeros(1, 8))) == 1.0


def test_si_sdr_ignores_scale():
    x = wave()
    y = x + 0.1 * wave(seed=1)
    torch.testing.assert_close(si_sdr(y, x), si_sdr(5 * y, x), atol=1e-3, rtol=0)
    assert float(si_sdr(y, x).mean()) == pytest.approx(20, abs=1)


@pytest.mark.parametrize(
    "options", [{"n_fft": 130}, {"n_fft": 128, "hop": 65}, {"hop": 0}, {"power": 0.0}, {"power": 1.5}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match="Codec has"):
        Codec(**options)


@pytest.mark.parametrize("shape", [(100,), (1, 200), (1, 1, 800)])
def test_bad_waves_are_refused(shape):
    with pytest.raises(ShapeError, match="wave has shape"):
        Codec().encode(torch.zeros(shape))
