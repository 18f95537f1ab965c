"""FE-LSD's small measures: verdicts follow from the scores, and a tiny run writes what the card reads."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.data.line_scenes import line_scenes
from foveal.models.line_segments.detector import Lines
from foveal.papers.cards import load_card
from foveal.papers.measures import fe_lsd_lines as fe


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Few scenes, the later of them more blurred."""
    made = line_scenes(12, torch.Generator().manual_seed(0), most=6.0)
    made = made.rows(made.displacement.argsort())
    monkeypatch.setattr(fe, "scenes", lambda: (made, made))
    monkeypatch.setattr(fe, "BATCH", 2)
    return made


def finds(monkeypatch, share) -> None:
    """Detectors that find the first ``share(fusion, seen in training, seen now, place)`` of the segments of a scene."""
    monkeypatch.setattr(fe, "trained", lambda fusion, seen, seed, steps: (fusion, seen))

    def detected(model, of, seen):
        out = []
        for i, one in enumerate(of.segments):
            kept = one[: round(share(*model, seen, i / len(of.segments)) * len(one))]
            out.append(Lines(kept, torch.ones(len(kept))))
        return out

    monkeypatch.setattr(fe, "detected", detected)


@pytest.mark.parametrize(
    ("sharp", "verdict"), [(0.0, "reproduced"), (0.3, "reproduced"), (0.7, "direction holds"), (1.0, "not reproduced")]
)
def test_the_verdict_on_sharp_training_follows_from_the_ratio(monkeypatch, tmp_path, sharp, verdict):
    finds(monkeypatch, lambda fusion, trained, now, at: sharp if trained != now else 1.0)
    result = fe.measure_sharp(seeds=2, out=tmp_path)
    assert result["verdict"] == verdict
    assert result["measured"]["msap"]["sharp-trained on sharp"]["mean"] == 1
    assert (result["measured"]["ratio"] is None) == (sharp == 0)


def shares(full, frame, events):
    table = {"full": full, "frame": frame, "events": events, "add": lambda at: 0.5}
    return lambda fusion, trained, now, at: table[fusion](at)


@pytest.mark.parametrize(
    ("frame", "events", "verdict"),
    [
        (lambda at: 1 - at, lambda at: 0.2, "reproduced"),
        (lambda at: 0.4 + 0.6 * at - 0.2 * (at > 0.6), lambda at: 0.0, "direction holds"),
        (lambda at: 0.5, lambda at: 1.0, "not reproduced"),
    ],
)
def test_the_verdict_on_fusion_needs_a_lead_at_strong_blur_that_grows(monkeypatch, tmp_path, frame, events, verdict):
    finds(monkeypatch, shares(lambda at: 1.0, frame, events))
    result = fe.measure_fusion(seeds=1, out=tmp_path)
    assert result["verdict"] == verdict
    rise = result["measured"]["spearman"]
    assert (rise is not None and rise > 0) == (verdict == "reproduced")


def test_trained_results_are_what_the_card_reads(tmp_path):
    for function, claim in (
        ("measure_sharp", "sharp-training-fails-on-blur"),
        ("measure_fusion", "fusion-gain-grows-with-blur"),
    ):
        result = getattr(fe, function)(steps=1, seeds=1, seed=3, out=tmp_path)
        assert json.loads((tmp_path / "fe_lsd" / f"{claim}.json").read_text()) == result
        named = next(c for c in load_card("fe_lsd").claims if c.id == claim).measured_by
        assert named == f"foveal.papers.measures.fe_lsd_lines:{function}"
        for row in result["measured"]["msap"].values():
            assert 0 <= row["mean"] <= 1


def test_groups_by_blur_are_scored_apart(few):
    found = [Lines(s, torch.ones(len(s))) for s in few.segments[:6]]
    found += [Lines(s + 20, torch.ones(len(s))) for s in few.segments[6:]]
    assert fe.by_blur(found, few, 2) == [1.0, 0.0]


def test_training_learns_its_scenes(monkeypatch):
    monkeypatch.setattr(fe, "BATCH", 4)
    losses = {}

    def fit(model, loss, steps, **options):
        losses["all"] = real(model, loss, steps, **options)
        return losses["all"]

    real = fe.fit
    monkeypatch.setattr(fe, "fit", fit)
    fe.trained("full", "blurred", 0, 12)
    assert sum(losses["all"][-3:]) < 0.7 * sum(losses["all"][:3])
