"""Scenes say what they show: the pixels, the questions and their answers agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import ConfigError
from foveal.data.scenes import (
    BACKGROUND,
    COLOURS,
    NUMBERS,
    Scene,
    Thing,
    cell_mask,
    hallucinated,
    mentions,
    questions,
    render,
    scene,
)


def made(seed: int, things: int = 4, **options: object) -> Scene:
    return scene(torch.Generator().manual_seed(seed), things, **options)  # type: ignore[arg-type]


@given(st.integers(0, 999), st.integers(1, 9))
def test_every_thing_lies_in_its_cell_in_its_colour(seed: int, things: int) -> None:
    s = made(seed, things)
    picture = render(s, 60).astype(int)
    drawn = abs(picture - np.array(BACKGROUND)).max(-1) > 60
    cells = tuple((t.row, t.column) for t in s.things)
    assert len(set(cells)) == things and cells == tuple(sorted(cells))
    assert not drawn[~cell_mask(cells, 60)].any()
    for t in s.things:
        inside = cell_mask(((t.row, t.column),), 60)
        exact = (picture == np.array(COLOURS[t.colour])).all(-1)
        assert exact[inside].sum() > 20, t


@given(st.integers(0, 999), st.integers(1, 8))
def test_answers_are_true(seed: int, things: int) -> None:
    s = made(seed, things)
    names = [t.name for t in s.things]
    for q in questions(s, torch.Generator().manual_seed(seed)):
        words = q.text.split()
        if q.kind == "presence":
            assert (" ".join(words[3:5]) in names) == (q.answer == "yes")
        elif q.kind == "count":
            assert q.answer == NUMBERS[sum(t.shape == words[2] for t in s.things)]
        elif q.kind == "colour":
            assert [t.colour for t in s.things if t.shape == words[4]] == [q.answer]
        else:
            assert q.kind == "place" and names.count(" ".join(words[3:5])) == 1


def test_the_same_seed_gives_the_same_picture_and_clutter_adds_lines() -> None:
    assert made(3) == made(3) and made(3) != made(4)
    plain, full = made(3), made(3, clutter=8)
    assert plain.things == full.things and len(full.clutter) == 8
    assert not np.array_equal(render(plain), render(full))


def test_printed_words() -> None:
    pytest.importorskip("PIL", reason="needs the package pillow")
    s = made(5, 3, word=True)
    assert s.word is not None and s.caption().endswith(f"and the word {s.word[0]}")
    inside = cell_mask((s.word[1:],), 224)
    dark = render(s, 224).max(-1) < 60
    black = any(t.colour == "black" for t in s.things)
    assert dark[inside].sum() > 30 and (black or not dark[~inside].any())
    asked = [q for q in questions(s, torch.Generator().manual_seed(0)) if q.kind == "word"]
    assert [q.answer for q in asked] == [s.word[0]]


def test_hallucinated_things_are_counted() -> None:
    s = Scene((Thing("cross", "green", 0, 0), Thing("circle", "red", 1, 1)))
    assert mentions("a green cross, a blue square and a red") == ["green cross", "blue square"]
    found = hallucinated([("a green cross , a blue square", s), ("a red circle", s)])
    assert found == {"chair_s": 0.5, "chair_i": 1 / 3, "recall": 0.5}


def test_captions_and_bad_input() -> None:
    s = Scene((Thing("circle", "red", 0, 0), Thing("square", "blue", 2, 1)))
    assert s.caption() == "a red circle , a blue square"
    with pytest.raises(ConfigError, match="things is 10; expected 1 to 9"):
        made(0, 10)
