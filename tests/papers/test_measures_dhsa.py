"""DHSA's premises: the measured recall against a dense mask, and result files that a card can read."""

import json
from itertools import pairwise

import pytest
import torch

from foveal.core.errors import ConfigError
from foveal.papers.cards import load_card
from foveal.papers.measures import dhsa
from foveal.papers.measures.results import write_result


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(dhsa, "LENGTH", 512)


@pytest.mark.parametrize("pooling", ["avgpool", "avgpool_norm"])
def test_recall_equals_a_dense_computation(short, pooling):
    data = dhsa.sample(3)
    q, k, n = data.q[0, 0], data.k[0, 0], 512
    weights = torch.softmax((q @ k.T / 8).masked_fill(torch.ones(n, n).triu(1) > 0, -torch.inf), -1)
    edges = [*data.starts[0].tolist(), n]
    total = 0.0
    for u in range(4, 8):
        mean, end = q[u * 64 : u * 64 + 64].mean(0), u * 64 + 64
        score = torch.empty(n)
        for a, b in pairwise(edges):
            score[a:b] = mean @ k[a:b].sum(0) / ((b - a) ** 0.5 if pooling == "avgpool_norm" else b - a)
        kept = (
            list(range(u * 64, end))
            + sorted(range(u * 64), key=lambda j: (-float(score[j]), j))[: max(0, end // 2 - 64)]
        )
        total += float(weights[u * 64 : end, kept].sum()) / 64
    assert dhsa.mass_recall(data, data.starts, pooling, density=0.5) == pytest.approx(total / 4, rel=1e-4)


def test_samples_are_seeded_and_segments_have_the_stated_lengths(short):
    a, b = dhsa.sample(1), dhsa.sample(1)
    assert torch.equal(a.k, b.k) and not torch.equal(a.k, dhsa.sample(2).k)
    lengths = a.starts[0].diff()
    assert int(lengths.min()) >= 8 and int(lengths.max()) <= 120
    assert set(dhsa.sample(1, equal=64).starts[0].diff().tolist()) == {64}


@pytest.mark.parametrize("measure", ["measure_boundaries", "measure_normalisation"])
def test_results_have_a_verdict_and_their_provenance(short, measure, tmp_path):
    result = getattr(dhsa, measure)(seeds=1, seed=7, out=tmp_path)
    claim = next(c for c in load_card("dhsa").claims if c.measured_by == f"foveal.papers.measures.dhsa:{measure}")
    assert json.loads((tmp_path / "dhsa" / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["seed"] == 7 and result["measured"]["seeds"] == 1
    assert result["versions"]["torch"] == torch.__version__ and result["machine"]["cores"] and result["date"]


def test_a_result_needs_a_claim_and_a_verdict(tmp_path):
    with pytest.raises(ConfigError, match="length-normalisation"):
        write_result("dhsa", "length-normalization", "reproduced", {}, seed=0, out=tmp_path)
    with pytest.raises(ConfigError, match="direction holds"):
        write_result("dhsa", "length-normalisation", "fine", {}, seed=0, out=tmp_path)
