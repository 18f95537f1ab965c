"""RCMHA's claims: what is counted is what is kept, and result files are what the card reads."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import rcmha


@pytest.mark.parametrize("measure", ["measure_recall", "measure_transfer", "measure_memory", "measure_parameters"])
def test_results_have_a_verdict_and_their_provenance(measure, monkeypatch, tmp_path):
    for name, value in {"SEEDS": 1, "TESTED": 2, "BATCH": 2, "ROWS": 2, "SHAPES": {"small": (2, 4)}}.items():
        monkeypatch.setattr(rcmha, name, value)
    rcmha.trained.cache_clear()
    options = {"steps": 2} if measure in ("measure_recall", "measure_transfer") else {}
    result = getattr(rcmha, measure)(**options, seed=7, out=tmp_path)
    rcmha.trained.cache_clear()
    claim = next(c for c in load_card("rcmha").claims if c.measured_by == f"foveal.papers.measures.rcmha:{measure}")
    assert json.loads((tmp_path / "rcmha" / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["seed"] == 7 and result["verdict"]


@pytest.mark.parametrize("form", rcmha.FORMS)
def test_the_model_begins_without_relative_positions_and_only_the_others_have_absolute_ones(form):
    model, ids = rcmha.model_of(form, 20, 0), torch.arange(12)[None] + 2
    layer = model.get_submodule("layers.0.attention.layer")
    _, relative = rcmha.FORMS[form]
    assert isinstance(model.embed, rcmha.Positioned) != relative
    if relative:
        assert not any(bool(t.any()) for t in (layer.content_bias, layer.rel_table, layer.rel_bias))
    assert model(ids).shape == (1, 12, model.vocab_size)


def test_saved_bytes_count_each_storage_once_and_no_parameters():
    base = rcmha.saved_bytes("MHA", 2, 4)
    assert 0 < base < rcmha.saved_bytes("MHA", 4, 4)
    assert rcmha.saved_bytes("MDHA", 2, 4) > base


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.2, 1.0, 0.2, 1.0), "reproduced"),
        ((0.2, 0.9, 0.2, 1.0), "direction holds"),
        ((0.5, 1.0, 0.2, 1.0), "direction holds"),
        ((0.2, 0.1, 0.2, 1.0), "not reproduced"),
    ],
)
def test_verdicts_of_recall_follow_from_the_criteria(values, verdict, monkeypatch, tmp_path):
    found = dict(zip(rcmha.FORMS, values, strict=True))
    monkeypatch.setattr(rcmha, "trained", lambda f, n, s, k: (found[f],))
    assert rcmha.measure_recall(out=tmp_path)["verdict"] == verdict


@pytest.mark.parametrize(
    ("pair", "verdict"),
    [((1.0, 0.95), "reproduced"), ((1.0, 0.5), "not reproduced"), ((0.25, 0.26), "not reproduced")],
)
def test_transfer_of_what_was_not_learned_counts_for_nothing(pair, verdict, monkeypatch, tmp_path):
    monkeypatch.setattr(rcmha, "trained", lambda f, n, s, k: pair)
    assert rcmha.measure_transfer(out=tmp_path)["verdict"] == verdict
