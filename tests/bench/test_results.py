"""Result files: provenance inside, whole or absent, no NaN."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveal.bench.results import load_average, rounded, write_result
from foveal.core.errors import DataError


def test_a_result_carries_its_provenance(tmp_path: Path) -> None:
    path = write_result(tmp_path / "new" / "r.json", {"value": 1.5})
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["value"] == 1.5
    assert {"torch", "machine", "date", "command", "git"} <= data["provenance"].keys()
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_nan_is_refused_and_the_old_file_stays(tmp_path: Path) -> None:
    path = write_result(tmp_path / "r.json", {"value": 1})
    before = path.read_text(encoding="utf-8")
    with pytest.raises(DataError, match=r"r\.json.*NaN"):
        write_result(path, {"value": float("nan")})
    assert path.read_text(encoding="utf-8") == before


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--out"):
        write_result(tmp_path / "file" / "r.json", {})


def test_rounding_keeps_significant_digits_and_structure() -> None:
    assert rounded({"a": [1.23456, 7], "b": 123456.7, "c": (True, None, "x")}) == {
        "a": [1.235, 7],
        "b": 123500.0,
        "c": [True, None, "x"],
    }


def test_load_average_is_a_number_or_unknown() -> None:
    load = load_average()
    assert load is None or load >= 0
