"""Measures on packaged prose: RCMHA's accuracy and the gate's learning rate."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import characters, gated_rate, rcmha_text


def check(result: dict, slug: str, claim: str, function: str, tmp_path) -> None:
    assert json.loads((tmp_path / slug / f"{claim}.json").read_text()) == result
    named = next(c for c in load_card(slug).claims if c.id == claim).measured_by
    assert named == f"foveal.papers.measures.{function}"


def test_windows_come_from_the_training_text_alone():
    text, held, vocabulary = characters.characters()
    assert len(held) == pytest.approx(len(text) / 19, rel=0.01)
    ids = characters.windows(5, 40, torch.Generator().manual_seed(0))
    assert ids.shape == (5, 41) and int(ids.min()) >= 0 and int(ids.max()) < vocabulary
    whole = bytes(text.tolist())
    assert all(bytes(row.tolist()) in whole for row in ids)


def test_gate_and_baseline_have_as_many_parameters():
    counts = [sum(p.numel() for p in gated_rate.model_of(gated, 0).parameters()) for gated in (False, True)]
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


@pytest.mark.parametrize(("worse", "verdict"), [(True, "direction holds"), (False, "not reproduced")])
def test_the_verdict_compares_increases_from_the_baselines_best_rate(monkeypatch, tmp_path, worse, verdict):
    def loss(gated, rate, seed, steps):
        steep = 1.0 if gated == worse else 3.0
        return 2.0 + steep * abs(rate - gated_rate.RATES[1]) + 0.01 * seed

    monkeypatch.setattr(gated_rate, "held_out_loss", loss)
    result = gated_rate.measure_rate(out=tmp_path)
    check(result, "gated", "larger-learning-rate", "gated_rate:measure_rate", tmp_path)
    assert result["measured"]["tuned_rate"] == gated_rate.RATES[1] and result["verdict"] == verdict


def test_a_real_run_has_finite_losses(monkeypatch, tmp_path):
    monkeypatch.setattr(characters, "HELD_OUT", 2)
    for name, value in {"LENGTH": 8, "DEPTH": 1, "BATCH": 1}.items():
        monkeypatch.setattr(gated_rate, name, value)
    result = gated_rate.measure_rate(steps=1, seeds=1, out=tmp_path)
    assert all(0 < v["mean"] < 20 for rows in result["measured"]["loss"].values() for v in rows.values())


def test_overhead_of_a_small_block(monkeypatch, tmp_path):
    monkeypatch.setattr(gated_rate, "WIDTH", 128)
    monkeypatch.setattr(gated_rate, "TOKENS", 32)
    result = gated_rate.measure_overhead(repeats=2, out=tmp_path)
    check(result, "gated", "gate-overhead", "gated_rate:measure_overhead", tmp_path)
    assert set(result["measured"]["overhead"]) == {"elementwise", "headwise"}


def test_accuracy_of_the_four_forms(monkeypatch, tmp_path):
    monkeypatch.setattr(characters, "HELD_OUT", 2)
    monkeypatch.setattr(rcmha_text, "DEPTH", 1)
    result = rcmha_text.measure_accuracy(steps=1, seeds=1, seed=3, out=tmp_path)
    check(result, "rcmha", "best-accuracy", "rcmha_text:measure_accuracy", tmp_path)
    assert all(0 <= row["mean"] <= 1 for row in result["measured"]["accuracy"].values())
    counts = result["measured"]["parameters"]
    assert counts["RCMHA"] > counts["RMHA"] and counts["MDHA"] > counts["MHA"]
