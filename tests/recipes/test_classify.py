"""Training of small classifiers: the schedule, standardisation, and that the same seed gives the same model."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from foveal.core.errors import ConfigError, DataError
from foveal.recipes.classify import accuracy, rate, standardise, train_classifier


def test_the_rate_warms_up_and_ends_near_zero():
    ours, paper = ([rate(e, 100, 20, start) for e in range(100)] for start in ("step", "paper"))
    assert ours[0] == pytest.approx(1 / 20) and paper[0] == 0 and ours[19] == 1 and paper[20] == ours[20] == 1
    assert ours[20:] == paper[20:] and all(a >= b for a, b in pairwise(ours[20:]))
    assert 0 < ours[-1] < 1e-3
    assert rate(60, 100, 20) == pytest.approx(0.5)


def test_standardise_uses_the_training_windows_alone():
    g = torch.Generator().manual_seed(0)
    train, test = 3 + 2 * torch.randn(50, 4, 6, generator=g), 9 + torch.randn(20, 4, 6, generator=g)
    for per, axes in (("channel_time", (0,)), ("channel", (0, 2))):
        a, b = standardise(train, test, per=per)
        torch.testing.assert_close(a.mean(axes), torch.zeros_like(a.mean(axes)), atol=1e-5, rtol=0)
        torch.testing.assert_close(a.std(axes, correction=0), torch.ones_like(a.mean(axes)))
        assert float(b.mean()) > 2
    with pytest.raises(ConfigError, match="channel_time"):
        standardise(train, per="time")


def test_training_learns_and_repeats():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=g)
    y = (x[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        begin = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 2))
    one, two, other = (copy.deepcopy(begin) for _ in range(3))
    before = torch.random.get_rng_state()
    losses = train_classifier(one, x, y, epochs=20, lr=1e-2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before), "the global generator is left alone"
    assert losses[-1] < 0.5 * losses[0] and accuracy(one, x, y) > 0.95 and not one.training
    assert train_classifier(two, x, y, epochs=20, lr=1e-2, seed=1) == losses
    assert train_classifier(other, x, y, epochs=20, lr=1e-2, seed=2) != losses


def test_paper_warm_up_moves_no_weight_in_the_first_epoch():
    x, y = torch.randn(16, 3), torch.zeros(16, dtype=torch.long)
    for start, moves in (("paper", False), ("step", True)):
        net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
        before = copy.deepcopy(net.state_dict())
        train_classifier(net, x, y, epochs=1, warmup=5, start=start)
        assert torch.equal(net[1].weight, before["1.weight"]) is not moves
        assert not torch.equal(net[0].running_mean, before["0.running_mean"])


def test_what_cannot_be_trained_is_said():
    net = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match="5 examples and 4 labels"):
        train_classifier(net, torch.zeros(5, 3), torch.zeros(4, dtype=torch.long), epochs=1)
    with pytest.raises(DataError, match="Lower lr"):
        train_classifier(net, torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long), epochs=1)
