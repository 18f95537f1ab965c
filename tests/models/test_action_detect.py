"""From maps to detections: soft-NMS, mAP at temporal IoU and average recall, by the identities of CSA's spec sheet."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ShapeError
from foveal.models.action import Maps
from foveal.models.action.detect import (
    THUMOS,
    Detections,
    Proposals,
    average_recall,
    classify,
    mean_average_precision,
    proposals,
    soft_nms,
)


def detections(rows: list[tuple[int, float, float, int, float]]) -> Detections:
    """Of ``(video, start, end, label, score)``."""
    video, start, end, label, score = zip(*rows, strict=True) if rows else ((), (), (), (), ())
    segment = torch.tensor([start, end], dtype=torch.float64).mT.reshape(-1, 2)
    return Detections(
        torch.tensor(video, dtype=torch.long), segment, torch.tensor(label, dtype=torch.long), torch.tensor(score)
    )


TRUTH = detections([(0, 0.1, 0.4, 3, 1.0), (0, 0.6, 0.9, 3, 1.0), (1, 0.2, 0.5, 3, 1.0), (2, 0.0, 0.5, 7, 1.0)])
FOUND = TRUTH._replace(score=torch.tensor([0.9, 0.8, 0.7, 0.6]))


def test_identity_9_perfect_detections_have_precision_1_everywhere():
    assert mean_average_precision(FOUND, TRUTH) == dict.fromkeys(THUMOS, 1.0)


def joined(a: Detections, b: Detections) -> Detections:
    return Detections(*(torch.cat(pair) for pair in zip(a, b, strict=True)))


def test_identity_9_duplicates_cost_only_what_stands_before_a_later_truth():
    last = FOUND._replace(score=FOUND.score - 1)
    assert mean_average_precision(joined(FOUND, last), TRUTH)[0.5] == 1
    ahead = FOUND._replace(score=FOUND.score + torch.tensor([0.01, 0.01, 0.01, -1]))
    expected = (1 + 2 / 3 + 3 / 5) / 3  # class 3: true, false, true, false, true, false
    assert mean_average_precision(joined(FOUND, ahead), TRUTH)[0.5] == pytest.approx((expected + 1) / 2)


def test_identity_9_a_shifted_segment_passes_half_and_fails_seven_tenths():
    shift = 0.3 * 0.25  # IoU (1 − 1/4) / (1 + 1/4) = 0.6
    truth = detections([(0, 0.1, 0.4, 0, 1.0)])
    found = detections([(0, 0.1 + shift, 0.4 + shift, 0, 0.5)])
    assert mean_average_precision(found, truth, (0.5, 0.59, 0.61, 0.7)) == {0.5: 1, 0.59: 1, 0.61: 0, 0.7: 0}


def test_identity_9_no_detections_are_zero_and_classes_without_truth_are_skipped():
    assert mean_average_precision(detections([]), TRUTH) == dict.fromkeys(THUMOS, 0.0)
    more = joined(FOUND, detections([(0, 0.1, 0.4, 5, 2.0)]))
    assert mean_average_precision(more, TRUTH) == dict.fromkeys(THUMOS, 1.0)
    with pytest.raises(ShapeError, match="no segments"):
        mean_average_precision(FOUND, detections([]))


def test_a_detection_takes_the_free_truth_it_overlaps_most():
    truth = detections([(0, 0.0, 0.4, 0, 1.0), (0, 0.1, 0.5, 0, 1.0)])
    first, second = (0, 0.05, 0.42, 0, 0.9), (0, 0.06, 0.44, 0, 0.8)
    assert mean_average_precision(detections([first, second]), truth, (0.5,)) == {0.5: 1}
    elsewhere = detections([(1, 0.0, 0.4, 0, 0.9)])
    assert mean_average_precision(elsewhere, truth, (0.5,)) == {0.5: 0}


def test_identity_10_one_proposal_is_kept_as_it_is():
    segments, scores = torch.tensor([[0.2, 0.4]]), torch.tensor([[0.7], [0.1]])
    found = soft_nms(segments, scores)
    assert torch.equal(found.segments, segments.expand(2, 1, 2)) and torch.equal(found.scores, scores)
    assert soft_nms(segments, scores, keep=0).segments.shape == (2, 0, 2)


def slowly(segments: Tensor, scores: Tensor, keep: int) -> list[tuple[int, float]]:
    left, out = dict(enumerate(scores.tolist())), []
    while left and len(out) < keep:
        best = max(left, key=left.__getitem__)
        out.append((best, left.pop(best)))
        a, b = segments[best].tolist()
        for k in left:
            c, d = segments[k].tolist()
            both = max(0.0, min(b, d) - max(a, c))
            iou = both / (b - a + d - c - both)
            if iou > 0.5 + 0.4 * (b - a):
                left[k] *= math.exp(-iou * iou / 0.4)
    return out


@given(st.integers(0, 999), st.integers(1, 12), st.integers(1, 12))
def test_identity_10_soft_nms_against_a_loop(seed, count, keep):
    g = torch.Generator().manual_seed(seed)
    start = 0.5 * torch.rand(count, generator=g, dtype=torch.float64)
    segments = torch.stack([start, start + 0.05 + 0.4 * torch.rand(count, generator=g, dtype=torch.float64)], 1)
    scores = torch.rand(3, count, generator=g, dtype=torch.float64)
    found = soft_nms(segments, scores, keep)
    for b in range(3):
        expected = slowly(segments, scores[b], keep)
        torch.testing.assert_close(found.segments[b], segments[[k for k, _ in expected]])
        torch.testing.assert_close(found.scores[b], torch.tensor([s for _, s in expected], dtype=torch.float64))
        assert all(s <= float(scores[b, k]) for k, s in expected)


def test_the_best_proposal_is_the_aligned_one():
    steps, a, b = 8, 2, 5
    start, end, cells = torch.full((1, steps), 0.1), torch.full((1, steps), 0.1), torch.full((1, steps, steps), 0.2)
    start[0, a] = end[0, b] = 0.9
    cells[0, a, b - 1] = 1.0
    found = proposals(Maps(start, end, cells, cells))
    torch.testing.assert_close(found.segments[0, 0], torch.tensor([a / steps, b / steps]))
    assert float(found.scores[0, 0]) == pytest.approx(0.81)
    assert float(found.segments[..., 1].max()) < 1 and found.segments.shape[1] == steps * (steps - 1) // 2


def test_every_proposal_is_scored_with_each_of_its_videos_best_classes():
    found = Proposals(torch.tensor([[[0.1, 0.2]], [[0.3, 0.5]]]), torch.tensor([[0.5], [1.0]]))
    rows = classify(found, torch.tensor([[0.1, 0.7, 0.2], [0.6, 0.0, 0.4]]), top=2)
    assert rows.video.tolist() == [0, 0, 1, 1] and rows.label.tolist() == [1, 2, 0, 2]
    torch.testing.assert_close(rows.score, torch.tensor([0.35, 0.1, 0.6, 0.4]))
    torch.testing.assert_close(rows.segment[2:], torch.tensor([[0.3, 0.5]] * 2))


def test_recall_counts_truths_that_are_among_the_first():
    found = Proposals(torch.tensor([[[0.0, 0.1], [0.5, 0.9]]]), torch.tensor([[0.9, 0.5]]))
    truth = [torch.tensor([[0.5, 0.9], [0.2, 0.3]])]
    assert average_recall(found, truth, 1) == 0 and average_recall(found, truth, 2) == pytest.approx(0.5)
