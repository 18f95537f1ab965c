"""The journal: resumes, never mixes runs, survives a torn line and a full disk."""

from __future__ import annotations

import json

import pytest

from foveal.core.errors import DataError
from foveal.tune.journal import Journal, write_whole


def test_what_was_put_is_there_after_reopening_in_order(tmp_path):
    first = Journal(tmp_path / "j.jsonl", "digest")
    first.put("b", {"x": 1})
    first.put("a", {"x": 2})
    again = Journal(tmp_path / "j.jsonl", "digest")
    assert list(again) == ["b", "a"]
    assert again["a"]["x"] == 2
    assert again.session == first.session + 1


def test_another_digest_sets_the_file_aside_and_starts_anew(tmp_path):
    Journal(tmp_path / "j.jsonl", "one").put("a", {"x": 1})
    other = Journal(tmp_path / "j.jsonl", "two")
    assert list(other) == []
    assert '"one"' in (tmp_path / "j.jsonl.old").read_text()


def test_a_torn_last_line_is_dropped_and_writing_goes_on(tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path, "d").put("a", {"x": 1})
    with path.open("a") as file:
        file.write('{"key": "b", "val')
    journal = Journal(path, "d")
    journal.put("c", {"x": 3})
    assert list(Journal(path, "d")) == ["a", "c"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_an_unwritable_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="--out"):
        Journal(tmp_path / "file" / "j.jsonl", "d")


def test_a_full_disk_keeps_what_was_measured(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "j.jsonl", "d")
    journal.put("a", {"x": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "_append", full)
    with pytest.raises(DataError, match=r"No space left on device.*is kept"):
        journal.put("b", {"x": 2})
    assert list(Journal(tmp_path / "j.jsonl", "d")) == ["a"]


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_whole(path, "old")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(DataError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert not (tmp_path / "results.json.part").exists()
