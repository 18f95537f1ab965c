"""MambAttention trained in small: gains are measured on what is said, and the result files are what the card reads."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import mambattention_training as training


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(training, "SAMPLES", 256)
    monkeypatch.setattr(training, "HELD_OUT", 3)


def check(result: dict, claim: str, tmp_path) -> None:
    assert json.loads((tmp_path / "mambattention" / f"{claim}.json").read_text()) == result
    named = next(c for c in load_card("mambattention").claims if c.id == claim).measured_by
    assert named.startswith("foveal.papers.measures.mambattention_training:measure_")


def test_overfitting_lowers_the_loss_and_says_so(tmp_path):
    result = training.measure_overfit(steps=4, seed=1, out=tmp_path)
    check(result, "model-can-learn", tmp_path)
    measured = result["measured"]
    assert measured["loss"]["last"] < measured["loss"]["first"]
    assert len(measured["gain_db"]) == training.CLIPS and measured["steps"] == 4


def test_sharing_reports_pairs_with_an_interval(tmp_path):
    result = training.measure_sharing(steps=1, seeds=2, seed=1, out=tmp_path)
    check(result, "sharing-helps", tmp_path)
    for name, (low, high) in result["measured"]["interval_95"].items():
        by_seed = result["measured"]["by_seed"][name]
        assert low <= sum(by_seed) / 2 + 1e-3 and sum(by_seed) / 2 <= high + 1e-3 and len(by_seed) == 2


def test_both_orders_are_trained_and_differ(tmp_path):
    result = training.measure_order(steps=1, seeds=1, seed=1, out=tmp_path)
    check(result, "attention-before-mamba", tmp_path)
    measured = result["measured"]
    assert set(measured["out_of_domain_db"]) == {"attention first", "mamba first"} and measured["by_seed"] != [0.0]


def test_an_untouched_mixture_gains_nothing():
    class Through(torch.nn.Module):
        def forward(self, magnitude, phase):
            return magnitude, phase

    noisy, clean = training.clips(3, torch.Generator().manual_seed(0), training.HEARD)
    assert float(training.improvement(Through(), noisy, clean).abs().max()) < 1e-2


def test_the_interval_of_equal_differences_is_a_point():
    assert training.interval(torch.full((3, 4), 0.5), seed=0, draws=50) == [0.5, 0.5]
