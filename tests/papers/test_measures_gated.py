"""Gated attention's claims: the laboratory's language is what it says, and result files are what the card reads."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.data.backcopy import BackCopy
from foveal.papers.cards import load_card
from foveal.papers.measures import gated


def test_the_language_copies_after_triggers_and_follows_its_table_elsewhere():
    language = BackCopy.make(words=8, triggers=2, seed=1)
    task = language.draw(400, 60, torch.Generator().manual_seed(0))
    ids = task.ids
    assert language.vocab_size == 9 and bool((ids[:, 0] == 8).all()) and bool((ids[:, 1] >= 2).all())
    after = ids[:, 1:-1] < 2
    assert bool((ids[:, 2:][after] == ids[:, :-2][after]).all())
    assert torch.equal(task.answer[:, 2:], after) and not bool(task.answer[:, :2].any())
    free = ~after & (ids[:, 1:-1] < 8)
    pairs = ids[:, 1:-1][free] * 8 + ids[:, 2:][free]
    counted = torch.bincount(pairs, minlength=64).view(8, 8).double()
    count, table = counted.sum(-1, keepdim=True), language.table.double()
    spread = (table * (1 - table) / count.clamp(min=1)).sqrt()
    assert bool(((counted / count - table).abs() <= 5 * spread + 1e-6)[2:].all()) and bool((count[2:] > 30).all())


@pytest.mark.parametrize("measure", ["measure_sink", "measure_sparsity"])
def test_results_have_a_verdict_and_their_provenance(measure, monkeypatch, tmp_path):
    for name, value in {"SEEDS": 1, "TESTED": 2, "BATCH": 2, "LENGTH": 24}.items():
        monkeypatch.setattr(gated, name, value)
    gated.lab.cache_clear()
    result = getattr(gated, measure)(steps=2, seed=7, out=tmp_path)
    gated.lab.cache_clear()
    claim = next(c for c in load_card("gated").claims if c.measured_by == f"foveal.papers.measures.gated:{measure}")
    assert json.loads((tmp_path / "gated" / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["seed"] == 7 and result["verdict"]


@pytest.mark.parametrize(
    ("values", "losses", "verdict"),
    [
        ((0.6, 0.1, 0.05), (1.0, 1.0, 1.0), "reproduced"),
        ((0.6, 0.1, 0.05), (1.0, 1.0, 0.9), "direction holds"),
        ((0.6, 0.1, 0.4), (1.0, 1.0, 1.0), "direction holds"),
        ((0.6, 0.1, 0.7), (1.0, 1.0, 1.0), "not reproduced"),
    ],
)
def test_verdicts_follow_from_the_criteria(values, losses, verdict, monkeypatch, tmp_path):
    names = ("baseline", "G1 elementwise", "G1 headwise")
    runs = dict(zip(names, zip(values, losses, strict=True), strict=True))
    monkeypatch.setattr(gated, "lab", lambda n, s, steps: {"first_key": runs[n][0], "loss": runs[n][1]})
    assert gated.measure_sink(out=tmp_path)["verdict"] == verdict
