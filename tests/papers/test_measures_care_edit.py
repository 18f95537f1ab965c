"""CARE-Edit's mask claim: scenes are what they say, and the verdict follows from the figures."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from foveal.papers.cards import load_card
from foveal.papers.measures import care_edit


@pytest.mark.parametrize("shaped", [False, True])
def test_coarse_masks_hold_a_shifted_and_grown_box_of_the_first_object(shaped):
    image, true, coarse = care_edit.scenes(40, 3, shaped)
    assert image.shape == (40, 3, 24, 24) and true.shape == coarse.shape == (40, 1, 12, 12)
    assert bool((true.sum((1, 2, 3)) >= 5).all()) and 0.2 < care_edit.iou(coarse, true) < 0.7
    wide = F.interpolate(true, scale_factor=2)
    inside = (image * wide).sum((2, 3)) / wide.sum((2, 3))
    spread = (((image - inside[..., None, None]) * wide) ** 2).sum((2, 3)) / wide.sum((2, 3))
    assert float(spread.mean()) < (0.05 if shaped else 1e-6), "one colour inside"
    box = true.amax(-1, keepdim=True) * true.amax(-2, keepdim=True)
    assert bool((coarse.sum((1, 2, 3)) > box.sum((1, 2, 3))).all())
    assert bool(((coarse * box) == box).all()), "growing makes up for the shift"


def test_iou_and_the_edits_loss():
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., :4, :4] = 1
    assert care_edit.iou(mask, mask) == 1.0 and care_edit.iou(mask, mask.roll(2, -1)) == pytest.approx(1 / 3)
    image = torch.rand(1, 3, 24, 24)
    assert float(care_edit.edit_loss(image, mask, mask)) == 0 < float(care_edit.edit_loss(image, 1 - mask, mask))


@pytest.mark.parametrize(
    ("iou", "mean", "verdict"),
    [(0.97, 1.0, "reproduced"), (0.97, 0.9, "direction holds"), (0.4, 1.0, "not reproduced")],
)
def test_the_verdict_follows_from_the_figures(monkeypatch, tmp_path, iou, mean, verdict):
    monkeypatch.setattr(
        care_edit, "refined", lambda residual, shaped, seed: {"coarse_iou": 0.5, "iou": iou, "mean": mean}
    )
    assert care_edit.measure_repaint(out=tmp_path)["verdict"] == verdict


def test_the_result_has_its_provenance(monkeypatch, tmp_path):
    for name, value in (("STEPS", 2), ("BATCH", 4), ("HELD_OUT", 8), ("SEEDS", 1)):
        monkeypatch.setattr(care_edit, name, value)
    result = care_edit.measure_repaint(out=tmp_path)
    assert result["measured"]["rows"].keys() == {
        f"{residual}, {kind}" for residual in ("signed", "paper") for kind in ("rectangles", "discs")
    }
    claim = next(c for c in load_card("care_edit").claims if c.id == "mask-repaint-signed")
    assert claim.measured_by == "foveal.papers.measures.care_edit:measure_repaint"
    assert json.loads((tmp_path / "care_edit" / "mask-repaint-signed.json").read_text()) == result
