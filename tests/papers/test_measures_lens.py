"""Measures of the lens's two papers, at a size that a test can afford."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the package transformers")
pytest.importorskip("scipy", reason="needs the package scipy")

from transformers import LlamaForCausalLM

from foveal.papers.measures import preplan_anchor, secondary_sinks
from foveal.papers.measures.preplan_anchor import f1, figures, planted_maps
from foveal.papers.measures.secondary_sinks import spearman
from tests.tune.tiny import save_tiny_model


def test_planted_sinks_are_found_exactly(tmp_path: Path) -> None:
    found = secondary_sinks.measure_lifetime(plants=3, out=tmp_path)["measured"]
    assert found["recall"] == found["precision"] == 1.0 and found["sinks"] >= 6
    lifetimes = list(found["mean_lifetime_by_size"].values())
    assert lifetimes == sorted(lifetimes) and lifetimes[0] < lifetimes[-1]


def test_planted_rhythms_are_found_exactly(tmp_path: Path) -> None:
    result = preplan_anchor.measure_planted(maps=2, out=tmp_path)
    assert result["verdict"] == "reproduced" and result["measured"]["head_split_right"] == 2
    maps, starts, anchors = planted_maps(0)
    assert torch.allclose(maps.sum(-1), torch.ones(()).double()) and len(starts) == len(anchors) == 11
    own = torch.arange(maps.shape[1])
    from foveal.lens.probes import LookBack

    want = (maps * (own[:, None] - own)).sum(-1)
    torch.testing.assert_close(figures(maps, LookBack()), want, atol=1e-9, rtol=1e-9)


def test_measures_on_a_tiny_model(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "tiny", layers=3))
    net = LlamaForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for layer in net.model.layers:  # attention that has peaks
            layer.self_attn.q_proj.weight.mul_(8)
            layer.self_attn.k_proj.weight.mul_(8)
    net.save_pretrained(model)
    scan = secondary_sinks.measure_small_model(model=model, context=64, texts=2, out=tmp_path)["measured"]
    assert scan["secondary"] == [0, 0] and len(scan["first_key_by_layer"]) == 3 and scan["ours"] == "no primary sink"
    for measure in (preplan_anchor.measure_entropy, preplan_anchor.measure_coupling):
        found = measure(model=model, texts=4, new_tokens=40, out=tmp_path)
        low, high = found["measured"]["interval"]
        assert low <= found["measured"]["ratio"] <= high and found["measured"]["texts"] == 4
        assert (found["verdict"] == "reproduced") == (low > 1)


def test_arithmetic() -> None:
    assert f1([1, 2, 3], [2, 3, 4]) == pytest.approx(2 / 3) and f1([], [1]) == 0
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 4, 9, 16])) == pytest.approx(1)
    assert spearman(torch.tensor([1.0, 2, 3]), torch.tensor([3.0, 2, 1])) == pytest.approx(-1)
    assert spearman(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 1, 2, 2])) == pytest.approx(math.sqrt(0.8))
