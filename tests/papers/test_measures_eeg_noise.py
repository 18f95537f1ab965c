"""Gains beside the noise between seeds: the verdict follows from the ratio, and a run gives numbers that make sense."""

from __future__ import annotations

import json

import pytest

from foveal.core.errors import ConfigError
from foveal.papers.cards import load_card
from foveal.papers.measures import eeg_channel_noise as noise


@pytest.mark.parametrize(
    ("gain", "verdict"), [(0.05, "direction holds"), (0.5, "not reproduced"), (-0.1, "direction holds")]
)
def test_the_verdict_follows_from_the_ratio(monkeypatch, tmp_path, gain, verdict):
    def scores(subject, seed, epochs):
        plain = 0.7 + 0.1 * (seed % 2)  # a deviation of 0.06 between seeds
        return {"BaseNet": plain} | {g: plain + gain - 0.001 * i for i, g in enumerate(noise.GATES)}

    monkeypatch.setattr(noise, "scores", scores)
    result = noise.measure_noise(out=tmp_path)
    assert result["verdict"] == verdict
    assert result["measured"]["rank_correlation_of_halves"] == 1.0
    assert json.loads((tmp_path / "eeg_channel_attention" / "gains-within-noise.json").read_text()) == result
    claim = next(c for c in load_card("eeg_channel_attention").claims if c.id == "gains-within-noise")
    assert claim.measured_by == "foveal.papers.measures.eeg_channel_noise:measure_noise"


def test_every_gate_is_scored(monkeypatch):
    monkeypatch.setattr(noise, "TRAIN", 16)
    monkeypatch.setattr(noise, "TEST", 16)
    found = noise.scores(0, 0, 1)
    assert set(found) == {"BaseNet", *noise.GATES} and all(0 <= v <= 1 for v in found.values())


def test_one_seed_has_no_deviation():
    with pytest.raises(ConfigError, match="seeds is 1"):
        noise.measure_noise(seeds=1)
