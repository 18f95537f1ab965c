"""ECA on textures: the images hold the two filters that their class names, and the result says what the card reads."""

from __future__ import annotations

import json

import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import eca_textures


def test_the_class_is_which_two_filters_are_strong(monkeypatch):
    monkeypatch.setattr(eca_textures, "NOISE", 0.1)
    x, label = eca_textures.textures(200, torch.Generator().manual_seed(0))
    bank = eca_textures.bank()
    power = torch.fft.rfft2(x).abs().square()
    strength = (power * bank).sum((2, 3)) / bank.sum((1, 2))
    found = strength.topk(2).indices.sort().values
    assert float((found == eca_textures.PAIRS[label]).all(1).double().mean()) > 0.9


def test_gates_have_the_weights_that_are_said_and_hosts_are_alike():
    nets = {v: eca_textures.network(v, 0) for v in eca_textures.VARIANTS}
    assert nets["plain"][1] == nets["Var1"][1] == 0
    assert nets["SE"][1] >= eca_textures.FEWER * nets["ECA"][1] > 0
    plain = nets["plain"][0].state_dict()
    for net, _ in nets.values():
        state = net.state_dict()
        assert torch.equal(state["layer1.0.conv1.weight"], plain["layer1.0.conv1.weight"])


def test_the_result_is_what_the_card_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(eca_textures, "HELD_OUT", 32)
    monkeypatch.setattr(eca_textures, "BATCH", 4)
    result = eca_textures.measure_textures(steps=1, seeds=1, seed=2, out=tmp_path)
    assert json.loads((tmp_path / "eca" / "textures-with-few-weights.json").read_text()) == result
    claim = next(c for c in load_card("eca").claims if c.id == "textures-with-few-weights")
    assert claim.measured_by == "foveal.papers.measures.eca_textures:measure_textures"
    assert sorted(result["measured"]["order"]) == sorted(eca_textures.VARIANTS)
