"""CSA on digit videos: verdicts follow from the numbers, and the numbers from the networks that are named."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from foveal.layers.csa import CSA
from foveal.papers.cards import load_card
from foveal.papers.measures import csa_digit_videos as csa


def claim_names(claim: str, function: str) -> bool:
    named = next(c for c in load_card("csa").claims if c.id == claim).measured_by
    return named == f"foveal.papers.measures.csa_digit_videos:{function}"


@pytest.fixture
def told(monkeypatch):
    """Figures in place of training: average mAP by variant and what the gates look at."""

    def tell(scores: dict[str, float], look: dict[str, float] | None = None) -> None:
        class Told:
            def __init__(self, variant: str, seed: int) -> None:
                self.variant, self.seed = variant, seed
                self.attention = CSA(2, 2, 2) if variant == "CSA" else None

        monkeypatch.setattr(csa, "held_out", lambda: None)
        monkeypatch.setattr(csa, "trained", lambda v, s, steps: Told(v, s))
        monkeypatch.setattr(csa, "scored", lambda m, videos: {"average_map": scores[m.variant] + 0.01 * m.seed})
        monkeypatch.setattr(csa, "evidence", lambda gates, videos: look)

    return tell


@pytest.mark.parametrize(
    ("gain", "ratio", "correlation", "verdict"),
    [
        (0.0, 2.5, 0.4, "reproduced"),
        (0.0, 1.5, 0.4, "direction holds"),
        (0.1, 3.0, 0.2, "direction holds"),
        (-0.1, 3.0, 0.4, "not reproduced"),
        (0.1, 0.9, 0.4, "not reproduced"),
        (0.1, 3.0, -0.4, "not reproduced"),
    ],
)
def test_the_verdict_on_evidence_needs_all_three(told, tmp_path, gain, ratio, correlation, verdict):
    told({"BMN": 0.5, "CSA": 0.5 + gain}, {"ratio": ratio, "mass": ratio / 3, "correlation": correlation})
    assert csa.measure_evidence(seeds=3, out=tmp_path)["verdict"] == verdict


@pytest.mark.parametrize(
    ("both", "verdict"), [(0.61, "direction holds"), (0.59, "not reproduced"), (0.54, "not reproduced")]
)
def test_the_verdict_on_both_gates_needs_to_beat_either_and_the_control(told, tmp_path, both, verdict):
    told({"BMN": 0.5, "control": 0.55, "SE": 0.52, "CSA": 0.6, "CSA + SE": both})
    result = csa.measure_complement(seeds=3, out=tmp_path)
    assert result["verdict"] == verdict
    assert set(result["measured"]["sign_test"]) == {"BMN", "control", "SE", "CSA"}
    assert result["measured"]["sign_test"]["BMN"]["positive"] == 3


def test_trained_results_are_what_the_card_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(csa, "HELD_OUT", 6)
    monkeypatch.setattr(csa, "BATCH", 2)
    monkeypatch.setattr(csa, "WIDTHS", (8, 4, 6))
    monkeypatch.setattr(csa, "SAMPLES", 2)
    for function, claim in (
        ("measure_evidence", "gates-find-evidence"),
        ("measure_complement", "complements-self-gates"),
    ):
        result = getattr(csa, function)(steps=1, seeds=2, seed=1, out=tmp_path)
        assert json.loads((tmp_path / "csa" / f"{claim}.json").read_text()) == result
        assert claim_names(claim, function)
        for rows in result["measured"]["by_seed"].values():
            assert len(rows) == 2 and all(0 <= x <= 1 for row in rows for x in row.values())


def test_evidence_reads_gradients_and_gates():
    videos = csa.digit_videos(20, csa.sources()[1], torch.Generator().manual_seed(0), steps=csa.T)
    torch.manual_seed(0)
    gates = CSA(csa.CLASSES + csa.NUISANCE, 8, csa.T)
    assert csa.evidence(gates, videos)["ratio"] == pytest.approx(1, abs=0.25)
    with torch.no_grad():
        gates.channel_conv.weight[:, csa.CLASSES :] *= 0.1
        gates.temporal_conv.weight.zero_()
        gates.temporal_conv.weight[:, : csa.CLASSES, 1] = 1.0
        gates.temporal_conv.bias.zero_()
        gates.temporal_out.weight.copy_(torch.eye(csa.T))
    found = csa.evidence(gates, videos)
    assert found["ratio"] == pytest.approx(10, rel=0.25)
    assert found["mass"] == pytest.approx(found["ratio"] * csa.CLASSES / csa.NUISANCE)
    videos.features[:, : csa.CLASSES] = videos.action[:, None].float() / csa.CLASSES
    assert csa.evidence(gates, videos)["correlation"] > 0.95
