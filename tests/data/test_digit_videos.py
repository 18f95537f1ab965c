"""Digit videos hold the actions that they say, and the class scores show them."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from foveal.core.errors import ConfigError, DataError
from foveal.data.digit_videos import CLASSES, GAP, LONGEST, NUISANCE, SHORTEST, digit_videos, frames, nuisance

TRAIN, TEST = frames()


def videos(count: int = 60, seed: int = 0, **options):
    return digit_videos(count, TEST, torch.Generator().manual_seed(seed), **options)


def test_pictures_are_split_and_sorted_by_class():
    assert len(TRAIN.pictures) == 1000 and len(TEST.pictures) == 297
    assert int(TRAIN.count.sum()) == 1000 and int(TEST.count.sum()) == 297
    assert not (TRAIN.pictures[:, None] == TEST.pictures[None, :20]).all(-1).any(), "a picture is in both"
    label = torch.arange(CLASSES).expand(50, -1)
    drawn = TEST.draw(label, torch.Generator().manual_seed(0))
    assert float((TEST.scores(drawn).argmax(-1) == label).double().mean()) > 0.85


def test_actions_are_the_steps_inside_segments():
    made = videos()
    steps = made.features.shape[2]
    for segments, action in zip(made.segments, made.action, strict=True):
        expected = torch.zeros(steps, dtype=torch.bool)
        edges = (segments * steps).round().long().tolist()
        for a, b in edges:
            assert SHORTEST <= b - a <= LONGEST and a >= 0 and b <= steps - 1
            expected[a:b] = True
        assert torch.equal(expected, action)
        assert all(c - b >= GAP for (_, b), (c, _) in itertools.pairwise(edges))
    counts = {len(s) for s in made.segments}
    assert counts == {1, 2, 3}


def test_class_scores_tell_actions_and_nuisance_does_not():
    made = videos(200)
    scores, rest = made.features[:, :CLASSES], made.features[:, CLASSES:]
    assert rest.shape[1] == NUISANCE and float(made.features.min()) >= 0 and float(made.features.max()) <= 1
    own = scores[torch.arange(200), made.label]
    assert float(own[made.action].mean()) > 0.55 > 3 * float(own[~made.action].mean())
    apart = [float(rest[:, k][made.action].mean() - rest[:, k][~made.action].mean()) for k in range(NUISANCE)]
    assert max(map(abs, apart)) < 0.06


def test_the_same_seed_gives_the_same_videos_and_short_ones_fit():
    a, b, c = videos(4, 1), videos(4, 1), videos(4, 2)
    assert torch.equal(a.features, b.features) and not torch.equal(a.features, c.features)
    short = videos(40, steps=LONGEST + GAP)
    assert all(len(s) >= 1 and float(s.max()) < 1 for s in short.segments)


def test_nuisance_is_as_long_as_actions():
    made = nuisance(40, 32, torch.Generator().manual_seed(0))
    high = (made > 0.45).double().mean()
    assert 0.15 < float(high) < 0.5


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match="steps=5"):
        videos(1, steps=5)
    with pytest.raises(DataError, match="learnt=1500"):
        frames(learnt=1500)
