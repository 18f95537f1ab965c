"""Routing's claims: what is measured is what is said, and the result files are what the card reads."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import routing


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(routing, "ROUTING_LENGTHS", (64, 128))
    monkeypatch.setattr(routing, "DENSE_LENGTHS", (64, 128))
    monkeypatch.setattr(routing, "TOKENS", 64)
    monkeypatch.setattr(routing, "CLUSTERS", 4)


def test_slope_of_a_power_law():
    x = [1.0, 2.0, 3.5, 7.0]
    assert routing.slope(x, [1.7 * a + 3 for a in x]) == pytest.approx(1.7)


def test_captured_mass_counts_the_pairs_inside_the_members(short):
    """Everything in one cluster captures everything; members of equal number capture the same in data without any structure."""
    x = routing.clustered(0, None)
    found = routing.captured(torch.zeros_like(x), 0)
    assert found == pytest.approx({"routing": 0.25, "random": 0.25, "local": 0.25}), "16 of 64 equal weights"
    tight = routing.captured(routing.clustered(1, 0.05), 1)
    assert tight["routing"] > 2 * tight["random"]


@pytest.mark.parametrize(
    ("measure", "options"),
    [("measure_cost", {"repeats": 1}), ("measure_mass", {"seeds": 1}), ("measure_leak", {"seeds": 1})],
)
def test_results_have_a_verdict_and_their_provenance(short, measure, options, tmp_path):
    result = getattr(routing, measure)(**options, seed=7, out=tmp_path)
    claim = next(c for c in load_card("routing").claims if c.measured_by == f"foveal.papers.measures.routing:{measure}")
    assert json.loads((tmp_path / "routing" / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["seed"] == 7 and result["verdict"]
