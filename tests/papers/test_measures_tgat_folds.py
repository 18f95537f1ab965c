"""EEG-tGAT's ablation and its choice of epoch: the choice is what is said, and the result files are what the card reads."""

from __future__ import annotations

import json

import pytest

from foveal.papers.cards import load_card
from foveal.papers.measures import eeg_tgat_folds


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(eeg_tgat_folds, "TRIALS", 10)
    eeg_tgat_folds.runs.cache_clear()
    yield
    eeg_tgat_folds.runs.cache_clear()


@pytest.mark.parametrize(
    ("measure", "claim"),
    [("measure_modules", "single-module-ablation"), ("measure_selection", "test-fold-selection-inflates")],
)
def test_results_have_a_verdict_and_their_numbers(measure, claim, tmp_path):
    result = getattr(eeg_tgat_folds, measure)(seeds=2, epochs=2, seed=3, out=tmp_path)
    assert json.loads((tmp_path / "eeg_tgat" / f"{claim}.json").read_text()) == result
    named = next(c for c in load_card("eeg_tgat").claims if c.id == claim).measured_by
    assert named == f"foveal.papers.measures.eeg_tgat_folds:{measure}" and result["seed"] == 3
    measured = result["measured"]
    assert measured["seeds"] == 2 and measured["epochs"] == 2
    if claim == "single-module-ablation":
        assert set(measured["gain"]) == set(eeg_tgat_folds.ABLATIONS) - {"GATv2"}
        assert all(len(v) == 2 and all(0 <= a <= 1 for a in v) for v in measured["accuracy"].values())
    else:
        assert len(measured["added"]) == 8 and all(row["mean"] >= 0 for row in measured["added"].values())


def test_the_inner_epoch_is_the_first_best_and_never_reads_the_test_fold():
    found = {"validation": [0.5, 0.8, 0.8], "test": [0.9, 0.6, 0.7]}
    assert eeg_tgat_folds.chosen(found) == {"inner": 0.6, "best": 0.9, "last": 0.7}


def test_curves_follow_every_epoch():
    found = eeg_tgat_folds.curves("both", "windows", 0, 3)
    assert {k: len(v) for k, v in found.items()} == {"validation": 3, "test": 3}
