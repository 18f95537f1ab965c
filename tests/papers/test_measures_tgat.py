"""EEG-tGAT's claims: what is measured is what is said, and the result files are what the card reads."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import eeg_tgat

PYG = pytest.mark.skipif(
    importlib.util.find_spec("torch_geometric") is None,
    reason="parity with PyTorch Geometric: pip install --no-deps torch_geometric xxhash",
)


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        ("measure_noop", {}),
        pytest.param("measure_geometric", {}, marks=PYG),
        ("measure_lookup", {"steps": 2, "seeds": 1}),
        ("measure_slot", {"seeds": 1, "epochs": 1}),
        ("measure_gain", {"seeds": 1, "epochs": 1}),
        ("measure_leak", {"seeds": 1, "epochs": 1}),
    ],
)
def test_results_have_a_verdict_and_their_provenance(measure, options, tmp_path, monkeypatch):
    monkeypatch.setattr(eeg_tgat, "TRAIN_TRIALS", 8)
    monkeypatch.setattr(eeg_tgat, "TEST_TRIALS", 4)
    monkeypatch.setattr(eeg_tgat, "LEAK_TRIALS", 10)
    result = getattr(eeg_tgat, measure)(**options, seed=3, out=tmp_path)
    claim = next(c for c in load_card("eeg_tgat").claims if c.measured_by.endswith(f":{measure}"))
    assert json.loads((tmp_path / "eeg_tgat" / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["seed"] == 3 and result["verdict"]
    if measure in ("measure_noop", "measure_geometric"):
        assert result["verdict"] == "reproduced"


def test_uniform_attention_has_a_mass_of_one():
    model = eeg_tgat.net(0).eval()
    assert model.attention is not None
    for part in (model.attention.query, model.attention.key):
        torch.nn.init.zeros_(part.weight)
    x, _, _ = eeg_tgat.planted_slot(3, slot=eeg_tgat.SLOT, samples=eeg_tgat.SAMPLES)
    assert eeg_tgat.slot_mass(model, x) == pytest.approx(1.0, abs=1e-5)
