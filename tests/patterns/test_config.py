"""Configuration of every pattern in ``tests/matrix.py``: JSON in and out, and messages that name the field and the fix."""

from __future__ import annotations

import dataclasses
import json

import pytest

from foveal.core.errors import ConfigError
from foveal.patterns import Pattern

from ..matrix import PATTERNS, Row

rows = pytest.mark.parametrize("row", PATTERNS.values(), ids=PATTERNS)


@rows
def test_json_round_trip(row: Row) -> None:
    for pattern in (row.pattern, row.full):
        data = json.loads(json.dumps(pattern.to_json()))
        again = Pattern.from_json(data)
        assert again == pattern
        assert hash(again) == hash(pattern)
        assert type(again) is type(pattern)
        assert pattern.registered_name in str(pattern)


@rows
def test_unknown_field_names_the_nearest(row: Row) -> None:
    fields = [f.name for f in dataclasses.fields(row.pattern)]
    typo = fields[0][:-1] + "_" if fields else "window"
    with pytest.raises(ConfigError) as error:
        Pattern.from_json({**row.pattern.to_json(), typo: 1})
    assert repr(typo) in str(error.value)
    assert row.pattern.registered_name in str(error.value)
    if fields:
        assert fields[0] in str(error.value)


@rows
def test_wrong_type_names_the_field(row: Row) -> None:
    for field in dataclasses.fields(row.pattern):
        with pytest.raises(ConfigError, match=rf"\b{field.name}\b.*(expected|unknown)"):
            Pattern.from_json({**row.pattern.to_json(), field.name: {"no": "such"}})
        with pytest.raises(ConfigError, match=rf"\b{field.name}\b"):
            dataclasses.replace(row.pattern, **{field.name: object()})


@rows
def test_out_of_range_names_field_value_and_range(row: Row) -> None:
    for field, value in row.wrong:
        with pytest.raises(ConfigError, match=rf"\b{field}\b.*expected") as error:
            Pattern.from_json({**row.pattern.to_json(), field: value})
        assert repr(value) in str(error.value)
