"""CARE-Edit's sparse dispatch: the counted work is what was chosen and its neighbours, and the result says so."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.functional import max_pool2d

from foveal.papers.cards import load_card
from foveal.papers.measures import care_dispatch


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(care_dispatch, "SIDE", 8)
    monkeypatch.setattr(care_dispatch, "BATCH", 2)


@pytest.mark.parametrize("kind", care_dispatch.KINDS)
def test_work_counts_chosen_tokens_and_their_neighbours(kind):
    dense, sparse = care_dispatch.both(kind, 2, 0)
    torch.testing.assert_close(dense.out, sparse.out, atol=1e-5, rtol=1e-5)
    near = max_pool2d(sparse.routing.chosen[..., 0].float().view(2, 1, 8, 8), 3, 1, 1).flatten(1).sum(1)
    assert sparse.work - 2 * 64 == 2 * int(near.max())  # rows of a batch have one length
    assert dense.work == 4 * 64


def test_every_expert_at_k_4_leaves_nothing_out(tmp_path):
    result = care_dispatch.measure_dispatch(seeds=1, out=tmp_path)
    assert json.loads((tmp_path / "care_edit" / "sparse-dispatch-work.json").read_text()) == result
    claim = next(c for c in load_card("care_edit").claims if c.id == "sparse-dispatch-work")
    assert claim.measured_by == "foveal.papers.measures.care_dispatch:measure_dispatch"
    measured = result["measured"]
    assert measured["executed_share"]["smooth, K = 4"]["mean"] == 1.0
    for name, row in measured["executed_share"].items():
        assert measured["chosen_share"][name] <= row["mean"] + 1e-4 <= 1.0001
    assert measured["largest_difference"] <= care_dispatch.EQUAL
