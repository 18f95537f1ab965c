"""Sampling and intervals: one row per stratum, figures exact when all rows are drawn, intervals that cover the truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveal.core.base_mask import BaseMask
from foveal.core.errors import ConfigError
from foveal.kernels import native
from foveal.lens import Estimate, profile_attention, stratified_mean, stratified_rows, weighted_quantile

from .brute import brute_force


def test_one_row_per_stratum_and_none_from_padding() -> None:
    real = torch.ones(3, 1000, dtype=torch.bool)
    real[1, :400] = False
    real[2, 5:] = False
    rows = stratified_rows(real, 300, seed=1)
    assert rows.index.shape == (3, 100)
    assert torch.isclose(rows.weight.sum(), torch.tensor(1.0, dtype=torch.float64))
    assert torch.equal(torch.div(rows.index[0], 10, rounding_mode="floor"), torch.arange(100))
    assert torch.equal(torch.div(rows.index[1] - 400, 6, rounding_mode="floor"), torch.arange(100))
    drawn = rows.weight[2] > 0
    assert rows.index[2][drawn].tolist() == [0, 1, 2, 3, 4] and rows.drawn == 205
    assert rows.fraction.tolist() == pytest.approx([0.1, 100 / 600, 1.0])
    assert torch.equal(stratified_rows(real, 300, seed=1).index, rows.index)
    assert not torch.equal(stratified_rows(real, 300, seed=2).index, rows.index)


def test_every_row_of_a_stratum_is_equally_likely() -> None:
    real = torch.ones(1, 21, dtype=torch.bool)
    count = torch.zeros(21)
    for seed in range(3000):
        count[stratified_rows(real, 3, seed).index[0]] += 1
    assert bool(((count / 3000 - 1 / 7).abs() < 4 * (1 / 7 * 6 / 7 / 3000) ** 0.5).all())


def test_weights_make_unequal_strata_unbiased() -> None:
    """10 rows in 3 strata of 3, 3 and 4 rows: the mean of the estimates is the mean of the values."""
    values = torch.arange(10.0).square()
    real = torch.ones(1, 10, dtype=torch.bool)
    found = []
    for seed in range(4000):
        rows = stratified_rows(real, 3, seed)
        found.append(float(stratified_mean(values[rows.index], rows).mean))
    error = torch.tensor(found).std() / len(found) ** 0.5
    assert abs(sum(found) / len(found) - float(values.mean())) < 4 * float(error)


def test_keep_and_nan() -> None:
    rows = stratified_rows(torch.ones(1, 4, dtype=torch.bool), 4, 0)
    values = torch.tensor([[[1.0, 2.0, 3.0, float("nan")]]])
    keep = torch.tensor([[True, True, True, False]])
    assert float(stratified_mean(values, rows, keep).mean[0]) == 2.0
    assert bool(stratified_mean(values, rows, torch.zeros(1, 4, dtype=torch.bool)).mean.isnan())
    assert float(weighted_quantile(torch.tensor([[[4.0, 1.0, 3.0, 9.0]]]), rows, 0.5, keep).mean[0]) == 3.0


def test_quantiles_of_all_rows() -> None:
    values = torch.rand(2, 1, 101, generator=torch.Generator().manual_seed(0))
    rows = stratified_rows(torch.ones(1, 101, dtype=torch.bool), 101, 0)
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        expected = torch.stack([torch.quantile(v[0].double(), p) for v in values])
        found = weighted_quantile(values, rows, p)
        assert torch.equal(found.mean, expected) and torch.equal(found.low, found.high)


def test_too_few_rows() -> None:
    with pytest.raises(ConfigError, match="rows is 1; expected at least 2"):
        stratified_rows(torch.ones(1, 9, dtype=torch.bool), 1, 0)


def structured(n: int) -> tuple[Tensor, Tensor]:
    """Heads with trends over position: a growing sink, a drifting focus, noise, and almost uniform attention."""
    g = torch.Generator().manual_seed(7)
    q, k = torch.randn(1, 4, n, 16, generator=g), torch.randn(1, 4, n, 16, generator=g)
    q[0, 0, :, 0], k[0, 0, 0, 0] = torch.linspace(0, 6, n), 8.0
    q[0, 1] *= torch.linspace(0.2, 4, n)[:, None]
    q[0, 2] *= 2
    q[0, 3] *= 0.1
    return q, k


def test_intervals_cover_the_truth() -> None:
    """Over 60 seeds and 4 heads, at least 90 % of the nominal 95 % intervals hold the exact figure, and they are not vacuous."""
    n, seeds = 600, 60
    q, k = structured(n)
    exact = profile_attention(q, k, rows=n)
    names = ("entropy_normalized", "keys90", "keys90_share", "keys90_median")
    hits = dict.fromkeys(names, 0)
    width = dict.fromkeys(names, 0.0)
    receivers = 0
    want = brute_force(q, k, _causal(n)).given_keys.mean(2)
    for seed in range(seeds):
        got = profile_attention(q, k, rows=60, seed=seed)
        for name in names:
            estimate: Estimate = getattr(got, name)
            truth = getattr(exact, name).mean
            hits[name] += int(((estimate.low <= truth) & (truth <= estimate.high)).sum())
            width[name] += float(((estimate.high - estimate.low) / truth).mean()) / seeds
        top = got.top_keys_share
        truth = want.gather(-1, got.top_keys)[..., 0]
        receivers += int(((top.low[..., 0] <= truth) & (truth <= top.high[..., 0])).sum())
    for name in names:
        assert hits[name] / (4 * seeds) >= 0.9, (name, hits[name] / (4 * seeds))
        assert 0 < width[name] < 0.35, (name, width[name])
    assert receivers / (4 * seeds) >= 0.8  # chosen by the rows that measure them


def _causal(n: int) -> BaseMask:
    return BaseMask.build(n, n, causal=True)


def test_the_kernels_measure_entropy_on_all_rows() -> None:
    q, k = structured(300)
    got = profile_attention(q, k, rows=20).entropy
    want = brute_force(q, k, _causal(300)).entropy().mean((0, 2))
    if native.unavailable() is None:
        assert torch.equal(got.low, got.high)
        torch.testing.assert_close(got.mean, want.double(), atol=1e-4, rtol=0)
    else:
        assert bool((got.low < got.high).all())
