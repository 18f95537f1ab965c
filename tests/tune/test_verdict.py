"""Paired ratios, intervals, and who wins."""

from __future__ import annotations

import math

import pytest
import torch

from foveal.tune.verdict import increase, judge, perplexity, ratios


def candidate(name: str, **changes: object) -> dict:
    row = {"name": name, "ppl_increase": 0.0, "decode_ppl_increase": 0.0, "needle": 1.0, "prefill_speedup": 1.0}
    return {**row, **changes}


def test_increase_is_the_ratio_of_perplexities_minus_one():
    dense = torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist()
    policy = [x + 0.01 for x in dense]
    rise, (low, high) = increase(policy, dense)
    assert rise == pytest.approx(perplexity(policy) / perplexity(dense) - 1)
    assert low == pytest.approx(rise) and high == pytest.approx(rise)


def test_interval_covers_the_true_mean_in_about_95_of_100_samples():
    g = torch.Generator().manual_seed(1)
    hits = 0
    for _ in range(200):
        difference = 0.02 + 0.3 * torch.randn(400, generator=g)
        _, (low, high) = increase(difference.tolist(), [0.0] * 400)
        hits += low <= math.expm1(0.02) <= high
    assert 180 <= hits <= 199


def test_ratios_pair_each_run_with_the_dense_runs_of_its_own_session():
    dense = [{"session": 1, "prefill": 10.0}, {"session": 1, "prefill": 12.0}, {"session": 2, "prefill": 40.0}]
    runs = [{"session": 1, "prefill": 5.5}, {"session": 2, "prefill": 10.0}, {"session": 3, "prefill": 1.0}]
    assert ratios(dense, runs, "prefill") == [2.0, 4.0]


def test_fastest_allowed_candidate_is_chosen_and_losers_say_why():
    rows = [
        candidate("dense"),
        candidate("fast but lossy", prefill_speedup=3.0, ppl_increase=0.02),
        candidate("lossy in decoding", prefill_speedup=2.5, decode_ppl_increase=0.5),
        candidate("blind", prefill_speedup=2.2, needle=0.5),
        candidate("slow", prefill_speedup=0.8),
        candidate("good", prefill_speedup=1.5),
        candidate("better", prefill_speedup=1.6),
    ]
    chosen, why = judge(rows, {"needle": 1.0}, 0.01, True)
    assert chosen == "better" and "1.60" in why
    verdicts = {r["name"]: r["verdict"] for r in rows}
    assert verdicts["good"] == "allowed" and verdicts["dense"] == "allowed"
    assert verdicts["slow"] == "slower than dense"
    assert {n for n, v in verdicts.items() if v == "over the loss limit"} == {
        "fast but lossy",
        "lossy in decoding",
        "blind",
    }
    assert "cached decoding" in rows[2]["why"]


def test_needles_do_not_count_when_dense_itself_is_blind():
    rows = [candidate("dense", needle="uninformative"), candidate("good", prefill_speedup=1.5, needle="uninformative")]
    assert judge(rows, {"needle": 0.2}, 0.01, False)[0] == "good"


def test_dense_is_chosen_when_nothing_is_faster():
    rows = [candidate("dense", prefill_speedup=0.99), candidate("slow", prefill_speedup=0.7)]
    chosen, why = judge(rows, {"needle": 1.0}, 0.01, True)
    assert chosen == "dense" and "No candidate" in why
    assert rows[0]["verdict"] == "chosen"
