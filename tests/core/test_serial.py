"""JSON in and out: what is written can be read, and what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from foveal.core.errors import ConfigError, nearest
from foveal.core.serial import check_range, check_types, from_json, to_json


@dataclass(frozen=True)
class Inner:
    depth: int = 1


@dataclass(frozen=True)
class Outer:
    size: int
    rate: float = 0.5
    name: str | None = None
    mode: Literal["fast", "slow"] = "fast"
    spans: tuple[int, ...] = ()
    pair: tuple[int, str] = (1, "a")
    inner: Inner = field(default_factory=Inner)
    flag: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "size", low=1, high=9)
        check_range(self, "rate", low=0.0)


def test_round_trip() -> None:
    value = Outer(3, 2.0, "x", "slow", (1, 2), (4, "b"), Inner(5), True)
    data = json.loads(json.dumps(to_json(value)))
    assert from_json(Outer, data) == value
    assert hash(from_json(Outer, data)) == hash(value)
    assert to_json(Outer(3)) == {"size": 3, "inner": {}}


def test_whole_numbers_are_numbers_but_not_the_other_way() -> None:
    assert isinstance(from_json(Outer, {"size": 1, "rate": 2}).rate, float)
    assert isinstance(Outer(1, rate=2).rate, float)
    with pytest.raises(ConfigError, match=r"Outer.size is 1.0 \(float\); expected a whole number"):
        from_json(Outer, {"size": 1.0})


WRONG: dict[str, tuple[Any, str]] = {
    "not an object": ([1], r"Outer is \[1\]; expected an object with the fields of Outer"),
    "unknown": ({"size": 1, "ratee": 1}, "Outer has an unknown field 'ratee'. Did you mean 'rate'?"),
    "unknown, far": ({"size": 1, "zzz": 1}, "Known names: flag, inner, mode"),
    "missing": ({}, "lacks the required field 'size'; add it, for example \"size\": int"),
    "null": ({"size": None}, "Outer.size is None.*expected a whole number"),
    "boolean for int": ({"size": True}, "Outer.size is True.*expected a whole number"),
    "boolean for float": ({"size": 1, "rate": False}, "Outer.rate is False.*expected a number"),
    "text for float": ({"size": 1, "rate": "1"}, "Outer.rate is '1'.*expected a number"),
    "int for bool": ({"size": 1, "flag": 1}, "Outer.flag is 1.*expected true or false"),
    "int for text": ({"size": 1, "name": 3}, "Outer.name is 3.*expected a string"),
    "choice": ({"size": 1, "mode": "fats"}, "Outer.mode is 'fats'; expected one of 'fast', 'slow'"),
    "list": ({"size": 1, "spans": 3}, "Outer.spans is 3; expected a list"),
    "list entry": ({"size": 1, "spans": [1, "x"]}, r"Outer.spans\[1\] is 'x'.*expected a whole number"),
    "list length": ({"size": 1, "pair": [1]}, "Outer.pair has 1 entries; expected 2"),
    "nested": ({"size": 1, "inner": {"dpth": 1}}, "Outer.inner has an unknown field 'dpth'. Did you mean 'depth'?"),
    "below": ({"size": 0}, "Outer.size is 0; expected a value from 1 to 9"),
    "above": ({"size": 10}, "Outer.size is 10; expected a value from 1 to 9"),
    "negative": ({"size": 1, "rate": -0.5}, "Outer.rate is -0.5; expected a value at least 0.0"),
    "not a number": ({"size": 1, "rate": float("nan")}, "Outer.rate is nan; expected a value at least 0.0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages_name_field_value_and_expectation(case: str) -> None:
    data, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        from_json(Outer, data)


def test_where_leads_to_the_place_in_a_file() -> None:
    with pytest.raises(ConfigError, match=r"^policy.json.layers\[3\].size is 'x'"):
        from_json(Outer, {"size": "x"}, "policy.json.layers[3]")


def test_construction_checks_types_too() -> None:
    with pytest.raises(ConfigError, match=r"Outer.mode is 'no'"):
        Outer(1, mode="no")  # type: ignore[arg-type]
    assert Outer(1, spans=[1, 2]).spans == (1, 2)  # type: ignore[arg-type]


def test_nearest() -> None:
    assert nearest("windw", ["window", "sinks"]) == "Did you mean 'window'?"
    assert nearest("zzz", ["b", "a"]) == "Known names: a, b."
    assert nearest("zzz", [str(i) for i in range(100, 120)]).endswith("111, ….")
    assert nearest("x", []) == "There are none."
