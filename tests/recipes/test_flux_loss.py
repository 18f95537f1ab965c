"""Schedules and penalties of Flux's training: the identities 5 and 10 of the spec sheet."""

from __future__ import annotations

import math

import pytest
import torch

from foveal.core.errors import ConfigError
from foveal.recipes.flux_loss import Multipliers, rate_at, sparsity, target_at, temperature


@pytest.mark.parametrize("steps", [10, 50, 300])
def test_identity_5_temperature(steps: int) -> None:
    decay = math.ceil(0.6 * steps)
    assert temperature(0, steps) == 1.5
    assert temperature(decay / 2, steps) == pytest.approx(1.25)
    assert all(temperature(t, steps) == 1.0 for t in range(decay, steps + 5))
    taus = [temperature(t, steps) for t in range(steps)]
    assert taus == sorted(taus, reverse=True)


@pytest.mark.parametrize("signed", [False, True])
def test_identity_10_the_penalty_is_zero_on_target_and_its_gradients(signed: bool) -> None:
    multipliers = Multipliers(3, signed=signed, seed=4)
    assert ((multipliers.linear > 0) & (multipliers.linear < 0.5)).all()
    on = multipliers(torch.full((5,), 0.4), 1, 0.4)
    assert not on.any()
    s = torch.tensor([0.1, 0.4, 0.9])
    penalty = multipliers(s, 1, 0.4)
    assert bool(penalty[1] == 0) and (penalty[[0, 2]] != 0).all()
    off = s - 0.4
    penalty.mean().backward()
    want = off.mean() if signed else off.abs().mean()
    assert torch.allclose(multipliers.linear.grad, torch.tensor([0.0, float(want), 0.0]))
    assert torch.allclose(multipliers.square.grad, torch.tensor([0.0, float((off**2).mean()), 0.0]))


def test_ascent_can_only_raise_unsigned_multipliers_and_lowers_signed_ones() -> None:
    for signed in (False, True):
        multipliers = Multipliers(1, signed=signed)
        before = float(multipliers.linear[0].detach())
        optimizer = torch.optim.AdamW(multipliers.parameters(), lr=0.1, maximize=True, weight_decay=0.0)
        multipliers(torch.tensor([0.2]), 0, 0.7).sum().backward()
        optimizer.step()
        assert (float(multipliers.linear[0]) > before) == (not signed)
        assert float(multipliers.square[0]) > 0


def test_sparsity_is_one_minus_the_mean_gate() -> None:
    gates = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.25])]
    assert sparsity(gates).tolist() == [0.0, 0.75]


def test_targets_rise_and_rates_warm_up() -> None:
    assert [target_at(0.8, t, 4) for t in (0, 1, 2, 4, 9)] == pytest.approx([0.0, 0.2, 0.4, 0.8, 0.8])
    assert target_at(0.8, 0, 0) == 0.8
    rates = [rate_at(t, 100) for t in range(100)]
    assert rates[:20] == pytest.approx([(t + 1) / 20 for t in range(20)])
    assert rates[20] == 1.0 and rates[60] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert rate_at(0, 1, 0.0) == 1.0
    with pytest.raises(ConfigError, match="warm-up"):
        rate_at(0, 10, 1.0)
