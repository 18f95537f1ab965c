"""Document lengths: the published bins, filling a sequence exactly, and the same draw from the same seed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.bench.documents import (
    CHOICES,
    DISTRIBUTIONS,
    distribution_for,
    draw_lengths,
    sample_documents,
    starts,
)
from foveal.core.errors import ConfigError


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.sampled_from(CHOICES), st.integers(1, 20_000), st.integers(0, 99))
def test_lengths_fill_the_sequence_and_repeat(name: str, length: int, seed: int) -> None:
    found = sample_documents(name, length, generator(seed))
    assert sum(found) == length and min(found) >= 1
    assert found == sample_documents(name, length, generator(seed))
    assert starts(found).tolist()[-1] == length and starts(found).diff().tolist() == list(found)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_bin_frequencies_within_three_sigma(name: str) -> None:
    count = 200_000
    edges, weights = DISTRIBUTIONS[name]
    drawn = draw_lengths(name, count, generator(1))
    found = torch.bucketize(drawn, torch.tensor(edges), right=True).bincount(minlength=len(edges))
    off = 0
    for seen, weight in zip(found.tolist(), weights, strict=True):
        p = weight / sum(weights)
        off += abs(seen - count * p) > 3 * math.sqrt(count * p * (1 - p))
    assert off <= 1, "0.27 % of the bins may be off"


@pytest.mark.parametrize(
    ("name", "total", "middle", "p90", "p99"),
    [("pile", 9993, 257, 1711, 9080), ("prolong64k", 10000, 383, 1441, 15286), ("prolong512k", 9998, 350, 1279, 9203)],
)
def test_published_sums_and_quantiles(name: str, total: int, middle: int, p90: int, p99: int) -> None:
    edges, weights = DISTRIBUTIONS[name]
    assert len(edges) == len(weights) and sum(weights) == total and list(edges) == sorted(set(edges))
    drawn = draw_lengths(name, 400_000, generator(0)).double()
    for share, expected, slack in ((0.5, middle, 0.02), (0.9, p90, 0.02), (0.99, p99, 0.05)):
        assert float(drawn.quantile(share)) == pytest.approx(expected, rel=slack)


def test_auto_follows_the_length() -> None:
    named = [distribution_for(n) for n in (8 << 10, (8 << 10) + 1, 64 << 10, (64 << 10) + 1)]
    assert named == ["pile", "prolong64k", "prolong64k", "prolong512k"]


def test_long_takes_three_fifths_of_the_tokens_from_long_documents() -> None:
    draws = [sample_documents("long", 8192, generator(seed)) for seed in range(20)]
    assert all(4915 in found for found in draws), "three fifths of 8,192 tokens, one document cut to them"
    assert len({found.index(4915) / len(found) > 0.5 for found in draws}) == 2, "it stands anywhere"
    found = sample_documents("long", 1 << 20, generator(0))
    assert sum(8 << 10 <= n <= 30 << 10 for n in found) >= 0.55 * (1 << 20) / (30 << 10)


def test_unknown_distribution() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pile'"):
        sample_documents("piles", 100, generator(0))
    with pytest.raises(ConfigError, match="at least 1"):
        sample_documents("pile", 0, generator(0))
