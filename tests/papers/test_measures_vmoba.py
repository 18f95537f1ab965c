"""VMoBA's FLOP identity to the printed digit, the share of pairs that a threshold keeps, and their result files."""

import json

import pytest

from foveal.papers.cards import load_card
from foveal.papers.measures import vmoba


def test_flop_identity():
    printed = {"55k": 705.02, "56k": 724.97, "76k": 1246.79, "33k": 281.64}
    assert {name: round(vmoba.model_teraflops(name), 2) for name in printed} == printed
    assert round(vmoba.model_teraflops("55k", 0.19), 1) == 248.7
    assert round(vmoba.model_teraflops("56k", 0.18), 1) == 248.4


def test_flops_are_those_of_the_parts():
    whole, dim = vmoba.layer_flops(100, dim=8, hidden=16, text=5), 8
    projections = 4 * 2 * 100 * dim * dim  # q, k, v, out: two operations per multiplication and addition
    attention = 2 * 2 * 100 * 100 * dim
    cross = 2 * 2 * 100 * dim * dim + 2 * 2 * 5 * dim * dim + 2 * 2 * 100 * 5 * dim
    assert whole == projections + attention + cross + 2 * 2 * 100 * dim * 16
    half = vmoba.layer_flops(100, 0.5, 10, dim=8, hidden=16, text=5)
    assert whole - half == attention / 2 - 2 * 100 * dim * 10


def test_kept_share_is_counted_from_the_layout(monkeypatch):
    monkeypatch.setattr(vmoba, "BLOCKS", 12)
    shares = [vmoba.kept_share(tau, 0) for tau in (0.05, 0.3, 0.6, 1.0)]
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert 1 / 12 <= shares[0] < 0.05 + 1 / 12 + 1 / (12 * 12 * 32)


@pytest.mark.parametrize(
    ("name", "verdict"), [("measure_flops", "reproduced"), ("measure_threshold", "direction holds")]
)
def test_results_have_a_verdict_and_belong_to_a_claim(name, verdict, tmp_path):
    options = {"seeds": 1} if name == "measure_threshold" else {}
    result = getattr(vmoba, name)(out=tmp_path, **options)
    claim = next(c for c in load_card("vmoba").claims if c.measured_by == f"foveal.papers.measures.vmoba:{name}")
    assert json.loads((tmp_path / "vmoba" / f"{claim.id}.json").read_text()) == result
    assert result["verdict"] == verdict
