"""MambAttention's count: what is measured is what the modules hold, and a wrong network is noticed."""

from __future__ import annotations

import json

from foveal.models.mambattention import network
from foveal.papers.cards import load_card
from foveal.papers.measures import mambattention


def test_the_count_is_written_with_its_verdict(tmp_path):
    result = mambattention.measure_parameters(out=tmp_path)
    assert result["verdict"] == "reproduced"
    assert result["measured"]["rounds_to_table"] == {"shared": True, "none": False}
    claim = next(c for c in load_card("mambattention").claims if c.id == "parameter-count")
    assert claim.measured_by == "foveal.papers.measures.mambattention:measure_parameters"
    assert json.loads((tmp_path / "mambattention" / "parameter-count.json").read_text()) == result


def test_a_shallower_dense_block_is_not_reproduced_to_the_unit(tmp_path, monkeypatch):
    dense = network.DilatedDense
    monkeypatch.setattr(network, "DilatedDense", lambda channels: dense(channels, depth=3))
    assert mambattention.measure_parameters(out=tmp_path)["verdict"] == "direction holds"
