"""SHRP's claims: figures follow from the modules, and the small experiments write what they saw."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import shrp
from foveal.recipes.shrp_cost import Shape


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(shrp, "STEPS", 3)
    monkeypatch.setattr(shrp, "SEEDS", 1)
    monkeypatch.setattr(shrp, "SMALL", Shape(layers=4, dim=16, num_heads=4, ffn=32, expander=8))
    shrp.trained.cache_clear()
    yield
    shrp.trained.cache_clear()


def test_the_percentages_of_the_abstract(tmp_path):
    found = shrp.measure_parameters(out=tmp_path)
    assert (
        found["verdict"] == "reproduced"
        and found["measured"]["by_expander_width"]["96"]["encoder_percent_cut"] == 48.38
    )
    assert found["measured"]["formula_against_modules"] < 1e-12


def test_counted_products_are_the_formulas(monkeypatch, tmp_path):
    monkeypatch.setattr(shrp, "TOKENS", (256,))
    found = shrp.measure_flops(out=tmp_path)
    assert found["verdict"] == "reproduced"
    assert found["measured"]["percent_left"]["256 tokens, width 96"] == 11.52
    assert found["measured"]["percent_left_if_the_ffn_stayed"] > 60


def test_a_layer_that_keeps_its_feed_forward_part_is_noticed():
    shape = Shape(layers=4, dim=16, num_heads=4, ffn=32, expander=8)
    layer = shrp._pruned(shape, impl="reference")
    assert shrp.counted_macs(layer, 8, 16) == shape.pruned_macs(8)
    layer.ffn = torch.nn.Linear(16, 16)
    assert shrp.counted_macs(layer, 8, 16) == shape.pruned_macs(8) + 256


def test_patches_are_2_by_2_pixels():
    x, label, _, _ = shrp.pictures()
    from foveal.data.digits import digits

    images = digits(held_out=shrp.HELD_OUT)[0]
    assert x.shape == (1797 - shrp.HELD_OUT, 16, 4) and len(label) == len(x)
    assert torch.equal(x[7, 6], images[7, 0, 2:4, 4:6].flatten())


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        ("measure_accuracy", {}),
        ("measure_choice", {}),
        (
            "measure_throughput",
            {"repeats": 1, "batches": (2,), "shape": Shape(dim=16, num_heads=4, ffn=32), "tokens": 8},
        ),
    ],
)
def test_results_have_a_verdict_and_their_provenance(short, measure, options, tmp_path):
    result = getattr(shrp, measure)(**options, out=tmp_path)
    claim = next(c for c in load_card("shrp").claims if c.measured_by == f"foveal.papers.measures.shrp:{measure}")
    assert json.loads((tmp_path / "shrp" / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["verdict"] and result["measured"]["ours"]
