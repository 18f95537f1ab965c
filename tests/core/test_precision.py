"""Average precision against its definition by thresholds, and against scikit-learn where the envelope changes nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import ShapeError
from foveal.core.precision import average_precision


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 3), st.integers(0, 99))
def test_is_the_best_precision_at_every_recall(hits, missed, seed):
    truths = sum(hits) + missed
    if truths == 0:
        return
    scores = torch.randperm(len(hits), generator=torch.Generator().manual_seed(seed)).double()
    ranked = [h for _, h in sorted(zip(scores.tolist(), hits, strict=True), reverse=True)]
    precision = [sum(ranked[: i + 1]) / (i + 1) for i in range(len(ranked))]
    expected = sum(max(precision[i:]) for i, h in enumerate(ranked) if h) / truths
    assert average_precision(scores, torch.tensor(hits, dtype=torch.bool), truths) == pytest.approx(expected)


def test_false_detections_after_the_last_true_one_cost_nothing():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, hits = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([1, 1, 0, 0, 0]).bool()
    assert average_precision(scores, hits, 2) == sklearn.average_precision_score(hits.numpy(), scores.numpy()) == 1
    assert average_precision(scores, hits.flip(0), 2) == pytest.approx(0.4)


def test_nothing_found_and_nothing_to_find():
    empty = torch.zeros(0)
    assert average_precision(empty, empty.bool(), 3) == 0
    assert math.isnan(average_precision(empty, empty.bool(), 0))
    with pytest.raises(ShapeError, match=r"\(2,\)"):
        average_precision(torch.zeros(2), torch.zeros(3).bool(), 1)
