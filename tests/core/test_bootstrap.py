"""The interval covers the mean as often as it says, and is as wide as theory says."""

from __future__ import annotations

import math

import numpy as np
import pytest

from foveal.core.bootstrap import bootstrap


def test_bootstrap_is_an_interval_of_the_mean() -> None:
    assert bootstrap([1.0]) is None and bootstrap([2.0] * 9) == [2.0, 2.0]
    g = np.random.default_rng(0)
    inside, widths = 0, []
    for seed in range(200):
        low, high = bootstrap(g.normal(3.0, 2.0, 50).tolist(), seed) or (0.0, 0.0)
        inside += low <= 3.0 <= high
        widths.append(high - low)
    assert 180 <= inside <= 199, "about 95 % of 200"
    assert np.mean(widths) == pytest.approx(2 * 1.96 * 2.0 / math.sqrt(50), rel=0.1)
    low, high = bootstrap([0.0, 1.0] * 20, 0, [99.0, 1.0] * 20) or (1.0, 1.0)
    assert 0.0 < low < high < 0.03, "weights count"
