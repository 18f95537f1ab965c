"""CARE-Edit's layer in a small editor: the scenes ask for what they say, and the result is what the card reads."""

from __future__ import annotations

import json

import torch

from foveal.models import DiT
from foveal.papers.cards import load_card
from foveal.papers.measures import care_layer


def test_edits_change_the_masked_pixels_alone():
    e = care_layer.edits(200, torch.Generator().manual_seed(0))
    changed = (e.base != e.target).any(1, keepdim=True)
    assert not bool((changed & (e.mask == 0)).any())
    assert bool((e.coarse >= e.mask).all())
    assert set(e.task.tolist()) == {0, 1, 2}
    assert bool((e.text[e.task != 1] == care_layer.COLOURS + care_layer.SHAPES).all())
    recoloured = e.task == 2
    middle = e.ref[recoloured].flatten(2)
    for i in range(int(recoloured.sum())):  # the reference holds the colour that the object gets
        inside = e.mask[recoloured][i, 0].bool()
        colour = e.target[recoloured][i][:, inside][:, 0]
        assert bool((middle[i] == colour[:, None]).all(0).any())


def test_a_new_editor_is_its_backbone_in_both_arms():
    backbone = DiT(care_layer.GRID, channels=3, patch=4, dim=64, depth=4, num_heads=4, seed=0)
    torch.nn.init.normal_(backbone.head.weight)
    e = care_layer.edits(2, torch.Generator().manual_seed(0))
    x, t = torch.randn(2, 3, 24, 24), torch.tensor([0.2, 0.8])
    for arm in ("routed", "static"):
        editor = care_layer.Editor(backbone, arm, 0)
        torch.testing.assert_close(editor(x, t, e)[0], backbone(x, t))
        assert not any(p.requires_grad for p in backbone.parameters())


def test_errors_are_those_of_the_predicted_picture():
    e = care_layer.edits(3, torch.Generator().manual_seed(0))
    noise = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    exact = care_layer.errors(lambda x, t: noise, e, noise)
    assert max(exact.values()) < 1e-5
    half = care_layer.errors(lambda x, t: noise * (1 - e.mask), e, noise)
    assert half["inside"] > 0.1 and half["outside"] < 1e-5


def test_the_result_is_what_the_card_reads(monkeypatch, tmp_path):
    for name, value in {"STEPS": 1, "BACKBONE_STEPS": 1, "BATCH": 2, "TESTED": 4}.items():
        monkeypatch.setattr(care_layer, name, value)
    result = care_layer.measure_layer(seeds=1, out=tmp_path)
    assert json.loads((tmp_path / "care_edit" / "layer-beats-no-layer.json").read_text()) == result
    claim = next(c for c in load_card("care_edit").claims if c.id == "layer-beats-no-layer")
    assert claim.measured_by == "foveal.papers.measures.care_layer:measure_layer"
    assert all(0 < v["inside"] <= 2 for v in result["measured"]["runs"][0].values())
