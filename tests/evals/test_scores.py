"""Figures: means, ties, cells, pairs and intervals."""

from __future__ import annotations

import math
from typing import Any

import pytest

from foveal.evals.scores import (
    BLOCK,
    blocks,
    choice,
    margin,
    passage_change,
    passage_figures,
    quiz_change,
    quiz_figures,
)


def ask(logp: float = -1.0, others: tuple[float, ...] = (-2.0, -3.0), right: int = 3, **at: float) -> dict[str, Any]:
    return {"at": at, "logp": logp, "others": list(others), "tokens": 3, "right": right, "gap": 0.5}


def test_choice_and_margin() -> None:
    assert choice(ask()) == 1.0 and margin(ask()) == 1.0
    assert choice(ask(-2.5)) == 0.0 and margin(ask(-2.5)) == -0.5
    assert choice(ask(-2.0)) == 0.5 and choice(ask(-2.0, (-2.0, -2.0))) == pytest.approx(1 / 3)
    assert margin(ask(others=())) == 0.5, "without wrong answers, the mean gap to the best other token"


def test_cells_group_by_the_axes_and_means_are_over_questions() -> None:
    units = [{"asks": [ask(x=1, y=2), ask(-2.5, right=1, x=1, y=2)]}, {"asks": [ask(x=3, y=2)]}]
    got = quiz_figures(units, ("x", "y"), seed=0)
    assert (
        got["asked"] == 3
        and got["exact"]["mean"] == pytest.approx(2 / 3, abs=1e-4)
        and got["chance"] == pytest.approx(1 / 3, abs=1e-4)
    )
    assert got["cells"] == [
        {
            "x": 1,
            "y": 2,
            "asked": 2,
            "exact": 0.5,
            "tokens": pytest.approx(2 / 3, abs=1e-4),
            "choice": 0.5,
            "margin": 0.25,
        },
        {"x": 3, "y": 2, "asked": 1, "exact": 1.0, "tokens": 1.0, "choice": 1.0, "margin": 1.0},
    ]
    assert "choice" not in quiz_figures([{"asks": [ask(others=(), x=1, y=1)]}], ("x", "y"), 0)


def test_changes_are_paired() -> None:
    dense = [{"asks": [ask(float(-i)) for i in range(20)]}]
    own = [{"asks": [ask(-i - 0.5) for i in range(20)]}]
    got = quiz_change(own, dense, seed=0)["margin"]
    assert got == {"mean": -0.5, "interval": [-0.5, -0.5]}, "questions differ widely, pairs do not"


def test_blocks_are_neighbours() -> None:
    means, counts = blocks([1, 2, BLOCK, BLOCK + 1, 5 * BLOCK], [1.0, 3.0, 10.0, 20.0, 7.0])
    assert means == [2.0, 15.0, 7.0] and counts == [2, 2, 1]


def passage(scale: float = 1.0) -> dict[str, Any]:
    position = list(range(1, 241))
    return {
        "position": position, "nll": [scale * (1.0 if p < 120 else 2.0) for p in position],
        "kl_position": [10, 200], "kl": [0.25, 0.75], "density": 0.5,
    }  # fmt: skip


def test_passages_give_a_curve_whose_bins_hold_every_position() -> None:
    got = passage_figures([passage()], "nll", 241, seed=0)
    assert got["scored"] == 240 == sum(row["scored"] for row in got["curve"]) and len(got["curve"]) == 12
    assert got["mean"] == pytest.approx(math.exp((119 + 2 * 121) / 240), abs=1e-5)
    assert got["curve"][0]["mean"] == pytest.approx(math.e, abs=1e-5) and got["curve"][-1]["mean"] == pytest.approx(
        math.e**2, abs=1e-5
    )
    assert got["interval"][0] < got["mean"] < got["interval"][1] and got["density"] == 0.5
    kl = passage_figures([passage()], "kl", 241, seed=0)
    assert kl["mean"] == 0.5 and [row["mean"] for row in kl["curve"]] == [0.25, 0.75]


def test_increase_is_paired() -> None:
    got = passage_change([passage(1.1)], [passage()], seed=0)
    assert got["increase"] == pytest.approx(math.expm1(0.1 * (119 + 2 * 121) / 240), abs=1e-5)
    same = passage_change([passage()], [passage()], seed=0)
    assert same["increase"] == 0.0 and same["interval"] == [0.0, 0.0]
