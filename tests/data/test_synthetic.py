"""Synthetic tasks: the answer is determined by the prompt, everything follows from the generator."""

from __future__ import annotations

import itertools

import pytest
import torch

from foveal.core.errors import ConfigError, DataError, ShapeError
from foveal.data.digits import digits
from foveal.data.synthetic import (
    CAPTION_TOKENS,
    COLOURS,
    FIRST,
    SEPARATOR,
    SHAPES,
    distant_values,
    key_values,
    key_values_vocabulary,
    markov,
    shapes,
    transitions,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("length", [None, 23, 60])
def test_every_answer_stands_behind_its_key_in_the_prompt(length, listed):
    keys, values = 16, 9
    task = key_values(20, 6, 4, generator(), keys=keys, values=values, length=length, listed=listed)
    assert task.ids.shape == (20, length or 21) and int(task.ids.max()) < key_values_vocabulary(keys, values)
    for row, answer in zip(task.ids.tolist(), task.answer.tolist(), strict=True):
        end = row.index(SEPARATOR)
        told = {a: b for a, b in itertools.pairwise(row[:end]) if FIRST <= a < FIRST + keys}
        assert len(told) == 6 and all(v >= FIRST + keys for v in told.values())
        tail = row[end + 1 :]
        asked, replies = (tail[:4], tail[4:]) if listed else (tail[::2], tail[1::2])
        assert len(set(asked)) == 4 and [told[k] for k in asked] == replies
        assert [t for t, scored in zip(row, answer, strict=True) if scored] == replies


def test_places_and_keys_vary():
    task = key_values(200, 3, 1, generator(), keys=8, length=30)
    first = (task.ids != 0).float().argmax(1)
    assert len(first.unique()) > 8 and len(task.ids[:, -2].unique()) == 8


@pytest.mark.parametrize("changes", [{"pairs": 99}, {"asked": 7}, {"asked": 0}, {"length": 10}])
def test_impossible_retrieval_is_refused(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        key_values(**{"batch": 1, "pairs": 6, "asked": 4, "generator": generator(), **changes})


def test_distant_values_stand_behind_their_keys_far_away_and_the_rest_is_the_chain():
    table, length, pairs, gap = transitions(10, 3, seed=4), 90, 5, 30
    task = distant_values(40, length, pairs, gap, generator(), table=table, keys=8, values=6)
    first_key, first_value = FIRST + 10, FIRST + 18
    for ids, answer, near in zip(task.ids.tolist(), task.answer.tolist(), task.near.tolist(), strict=True):
        at = [i for i, t in enumerate(ids) if first_key <= t < first_value]
        told, asked = at[:pairs], at[pairs:]
        values = {ids[i]: ids[i + 1] for i in told}
        assert len(values) == pairs == len(asked) and all(v >= first_value for v in values.values())
        assert asked[0] - (told[-1] + 1) >= gap and [values[ids[i]] for i in asked] == [ids[i + 1] for i in asked]
        assert [i for i, yes in enumerate(answer) if yes] == [i + 1 for i in asked]
        assert near.count(True) >= length - 1 - 6 * pairs
        for i in (i for i, yes in enumerate(near) if yes):
            assert float(table[ids[i - 1] - FIRST, ids[i] - FIRST]) > 0, "a token of the chain after its predecessor"


@pytest.mark.parametrize("changes", [{"pairs": 9}, {"length": 49}, {"pairs": 0}])
def test_distant_values_that_do_not_fit_are_refused(changes):
    setting = {"batch": 1, "length": 60, "pairs": 5, "gap": 30, "keys": 8, **changes}
    with pytest.raises(ConfigError, match="distant_values has length="):
        distant_values(**setting, generator=generator(), table=transitions(10, 3, seed=4))


def test_markov_follows_its_table():
    table = transitions(12, 3, seed=4)
    assert torch.allclose(table.sum(1), torch.ones(12)) and bool(((table > 0).sum(1) == 3).all())
    task = markov(50, 40, generator(), table=table)
    states = task.ids - FIRST
    assert bool((table[states[:, :-1], states[:, 1:]] > 0).all())
    assert bool(task.answer[:, 1:].all()) and not bool(task.answer[:, 0].any())


def test_captions_say_what_is_there():
    pictures, caption = shapes(300, 16, generator())
    assert pictures.shape == (300, 3, 16, 16) and int(caption.max()) < CAPTION_TOKENS
    lit = pictures.amax(1) > 0
    for picture, mask, (shape, colour, quadrant) in zip(pictures, lit, caption.tolist(), strict=True):
        ys, xs = mask.nonzero().unbind(1)
        assert picture[:, ys[0], xs[0]].tolist() == list(COLOURS[colour - len(SHAPES)])
        height, width = int(ys.max() - ys.min()) + 1, int(xs.max() - xs.min()) + 1
        filled = int(mask.sum()) / (height * width)
        assert {0: filled == 1, 1: 0.5 < filled < 1, 2: filled < 0.5}[shape]
        centre_y, centre_x = int(ys.max() + ys.min()) // 2, int(xs.max() + xs.min()) // 2
        if width <= 8:  # a shape that goes around the edge has no simple centre
            assert quadrant - len(SHAPES) - len(COLOURS) == (centre_y >= 8) * 2 + (centre_x >= 8)


def test_clips_move_one_pixel_a_frame_around_the_edge():
    clips, _ = shapes(4, 12, generator(), frames=5)
    assert clips.shape == (4, 3, 5, 12, 12)
    for t in range(1, 5):
        assert torch.equal(clips[:, :, t], clips[:, :, 0].roll(t, -1))


def test_everything_follows_from_the_generator():
    one, two, other = (shapes(5, 12, generator(s))[0] for s in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_digits_are_real_split_and_scaled():
    pytest.importorskip("sklearn")
    x, y, held, labels = digits(held_out=297)
    assert x.shape == (1500, 1, 8, 8) and held.shape == (297, 1, 8, 8) and len(y) == 1500 and len(labels) == 297
    assert float(x.min()) == -1 and float(x.max()) == 1 and sorted(y.unique().tolist()) == list(range(10))
    again = digits(held_out=297)[2]
    assert torch.equal(again, held) and not torch.equal(digits(held_out=297, seed=1)[2], held)
    with pytest.raises(DataError, match="held_out=0"):
        digits(held_out=0)


CHAIN = torch.full((4, 4), 0.25)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: markov(2, 0, generator(), table=CHAIN), ConfigError, "length=0"),
        (lambda: markov(2, 5, generator(), table=CHAIN[:3]), ShapeError, r"table has shape \(3, 4\)"),
        (lambda: markov(2, 5, generator(), table=CHAIN[0]), ShapeError, r"table has shape \(4,\)"),
        (lambda: markov(2, 5, generator(), table=CHAIN[:0, :0]), ShapeError, r"table has shape \(0, 0\)"),
        (lambda: distant_values(1, 60, 5, 30, generator(), table=torch.ones(())), ShapeError, "table has shape"),
        (lambda: transitions(0, 0, 0), ConfigError, "size=0, likely=0"),
        (lambda: transitions(3, 4, 0), ConfigError, "size=3, likely=4"),
        (lambda: shapes(2, 12, generator(), frames=-1), ConfigError, "frames=-1"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()
