"""Rank correlation: ties share their mean rank, a constant has none."""

from __future__ import annotations

import math

import pytest
import torch

from foveal.core.ranks import mean_ranks, spearman


def test_ties_share_their_mean_rank() -> None:
    assert mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_correlation_follows_order_alone() -> None:
    a = torch.tensor([0.1, 5.0, -2.0, 7.0, 7.5])
    assert spearman(a, a.exp()) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)
    assert math.isnan(spearman(a, torch.ones(5)))
