"""One language for how much: tokens, density or mass."""

from __future__ import annotations

from typing import Any

import pytest

from foveal.core.budget import Budget
from foveal.core.errors import ConfigError
from foveal.core.serial import from_json, to_json


@pytest.mark.parametrize("budget", [Budget(tokens=5), Budget(density=0.25), Budget(mass=1.0)], ids=str)
def test_round_trip(budget: Budget) -> None:
    assert from_json(Budget, to_json(budget)) == budget
    assert len(to_json(budget)) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "Budget has no field; expected exactly one of tokens, density, mass"),
        ({"tokens": 4, "mass": 0.5}, "Budget has tokens and mass; expected exactly one"),
        ({"tokens": 0}, "Budget.tokens is 0; expected a value at least 1"),
        ({"tokens": 1.5}, "Budget.tokens is 1.5.*whole number"),
        ({"density": 0.0}, "Budget.density is 0.0; expected a value above 0 and at most 1"),
        ({"density": 1.01}, "Budget.density is 1.01; expected a value at most 1.0"),
        ({"mass": -0.1}, "Budget.mass is -0.1; expected a value above 0"),
        ({"mass": float("nan")}, "Budget.mass is nan"),
    ],
)
def test_wrong_budgets(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_json(Budget, fields)


def test_keys_granted() -> None:
    assert Budget(tokens=5).keys(100) == 5
    assert Budget(tokens=5).keys(3) == 3
    assert Budget(density=0.25).keys(100) == 25
    with pytest.raises(ConfigError, match="mass budget has no fixed number of keys"):
        Budget(mass=0.5).keys(100)


def test_written_out() -> None:
    assert [str(b) for b in (Budget(tokens=5), Budget(density=0.125), Budget(mass=0.9))] == [
        "5 tokens",
        "density 0.125",
        "mass 0.9",
    ]
