"""Intervals of a mean without assumptions about its distribution."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLED, LEVEL = 2000, 0.95
"""Resamples, and the level of the intervals."""


def bootstrap(values: Sequence[float], seed: int = 0, weights: Sequence[float] | None = None) -> list[float] | None:
    """Percentile interval ``[low, high]`` of the mean at :data:`LEVEL`; None of fewer than two values.

    Args:
        values: what is resampled with replacement. weights: of each in the mean.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return None
    w = np.ones(len(x)) if weights is None else np.asarray(weights, dtype=np.float64)
    at = np.random.default_rng(seed).integers(len(x), size=(RESAMPLED, len(x)))
    means = (x[at] * w[at]).sum(1) / w[at].sum(1)
    tail = (1 - LEVEL) / 2
    return [round(float(q), 6) for q in np.quantile(means, [tail, 1 - tail])]
