"""HyLRA's claims on a tiny model: what is measured is what is said."""

from __future__ import annotations

import json

import pytest

from foveal.papers.cards import load_card
from foveal.papers.measures import hylra_smollm2 as measures
from tests.tune.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(measures, "TOKENS", 768)
    monkeypatch.setattr(measures, "PIECES", 1)


@pytest.mark.parametrize("name", ["measure_plan", "measure_accuracy", "measure_rivals"])
def test_results_belong_to_their_claim(folder, tmp_path, name):
    result = getattr(measures, name)(model=str(folder), seed=3, out=tmp_path)
    where = f"foveal.papers.measures.hylra_smollm2:{name}"
    claim = next(c for c in load_card("hylra").claims if c.measured_by == where)
    assert json.loads((tmp_path / "hylra" / f"{claim.id}.json").read_text()) == result
    measured = result["measured"]
    if name == "measure_plan":
        assert measured["brute_force"] == {"layers": 4, "equal": True}
        assert measured["planned"]["smallest"] >= measured["random"]["best_smallest"]
        return
    rows = measured["policies"]
    assert 0 < rows["hylra"]["attended"] < 1
    if name == "measure_rivals":
        assert rows["even spacing"]["attended"] == pytest.approx(rows["hylra"]["attended"], abs=0.02)
        assert rows["window"]["attended"] == pytest.approx(rows["hylra"]["attended"], abs=0.05)


def test_a_wrong_plan_does_not_reproduce(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "best_anchors", lambda a, changes: (0,))
    assert measures.measure_plan(model=str(folder), out=tmp_path)["verdict"] == "not reproduced"


def test_verdicts_follow_the_ratios(tmp_path, monkeypatch):
    def rows(hylra, even, window, attended=0.3):
        values = {"hylra": hylra, "even spacing": even, "window": window}
        return {"policies": {n: {"perplexity_ratio": v, "attended": attended} for n, v in values.items()}}

    def verdict(measure, *args, **kwargs):
        monkeypatch.setattr(measures, "_perplexities", lambda *_, **__: rows(*args, **kwargs))
        return measure(out=tmp_path)["verdict"]

    assert verdict(measures.measure_rivals, 1.01, 1.02, 1.5) == "reproduced"
    assert verdict(measures.measure_rivals, 1.03, 1.02, 1.5) == "direction holds"
    assert verdict(measures.measure_rivals, 1.6, 1.02, 1.5) == "not reproduced"
    assert verdict(measures.measure_accuracy, 1.03, 1, 1) == "reproduced"
    assert verdict(measures.measure_accuracy, 1.04, 1, 1) == "not reproduced"
    assert verdict(measures.measure_accuracy, 1.03, 1, 1, attended=0.4) == "not reproduced"


def test_a_window_of_a_share_keeps_that_share():
    for share in (0.1, 0.35, 1.0):
        w = measures.window(share, 1000)
        pairs = sum(min(w, i + 1) for i in range(1000))
        assert pairs / (1000 * 1001 / 2) == pytest.approx(share, abs=0.002)
