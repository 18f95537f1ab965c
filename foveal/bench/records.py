"""The result file of ``foveal bench``: JSON lines, a header first, then one complete line for every case and implementation.

A line is written when its case is finished, so an interrupted sweep keeps what it has and goes on there. A half-written last line is
dropped. A file of another schema, or measured elsewhere, is refused and left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.provenance import provenance

SCHEMA = 1
FILE = "results.jsonl"
_FIELDS = ("mask", "length", "heads", "kv_heads", "head_dim", "dtype", "direction", "draw", "impl")
"""What makes a line."""

Row = dict[str, Any]


def key(row: Mapping[str, Any], *, draw: bool = True) -> tuple[Any, ...]:
    """Identity of a line; without ``draw``, of all draws of a case together."""
    return tuple(row[name] for name in _FIELDS if draw or name != "draw")


def case(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """The case without draw and implementation: what implementations are compared on."""
    return key(row, draw=False)[:-1]


def read(path: Path | str) -> tuple[dict[str, Any], list[Row]]:
    """Header and lines of a result file, or of the folder that holds it.

    Raises:
        DataError: there is none, it is of another schema, or it is no result file.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(
            f"{path} cannot be read: {why}. Expected a {FILE} that foveal bench wrote, or its folder."
        ) from None
    header, rows, _ = _parse(text, path)
    return header, rows


def _parse(text: str, path: Path) -> tuple[dict[str, Any], list[Row], str]:
    """Header, lines, and the text without a half-written last line."""
    lines = text.splitlines(keepends=True)
    found: list[Any] = []
    good = ""
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if number:
                key(entry)
            elif not isinstance(entry, dict) or "foveal_bench" not in entry:
                raise KeyError
        except (json.JSONDecodeError, KeyError, TypeError):
            if number and number == len(lines) - 1:
                break  # cut off while it was written
            what = "is no result file of foveal bench" if not number else f"is damaged in line {number + 1}"
            raise DataError(f"{path} {what}; it is left as it is. Choose another --out, or another file.") from None
        found.append(entry)
        good += line if line.endswith("\n") else line + "\n"
        if not number and entry["foveal_bench"] != SCHEMA:
            raise DataError(
                f"{path} has schema {entry['foveal_bench']!r}; this foveal reads and writes schema {SCHEMA}. "
                "Measure again into another folder with --out, or use the foveal that wrote it."
            )
    if not found:
        raise DataError(f"{path} is empty; expected a result file of foveal bench. Delete it or choose another --out.")
    return found[0], found[1:], good


class Records:
    """A result file being written.

    Args:
        folder: where it is, or will be.
        settings: what must be the same for two lines to stand in one file.

    Raises:
        DataError: a file that is there is of another schema, or was measured with other settings or on another machine.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        where = provenance()
        machine = {name: where["machine"].get(name) for name in ("cpu", "gpu", "threads")}
        self.header: dict[str, Any] = {
            "foveal_bench": SCHEMA,
            "settings": {
                **settings, "machine": machine, "torch": where["torch"], "foveal": where["foveal"], "commit": (where["git"] or {}).get("commit"),
            },
            "provenance": where,
        }  # fmt: skip
        self.rows: list[Row] = []
        self._begun = False
        self._known: set[tuple[Any, ...]] = set()
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        header, self.rows, good = _parse(self.path.read_text(encoding="utf-8"), self.path)
        before, now = header.get("settings") or {}, self.header["settings"]
        differ = [name for name in now if json.loads(json.dumps(now[name])) != before.get(name)]
        if differ:
            told = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in differ)
            raise DataError(
                f"{self.path} was measured otherwise: {told}. Choose another --out; the file is left as it is."
            )
        self.header, self._begun = header, True
        self._known.update(map(key, self.rows))
        if good != self.path.read_text(encoding="utf-8"):
            self._guarded(lambda: self.path.write_text(good, encoding="utf-8"))

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether there is a line for this case and implementation."""
        return key(row) in self._known

    def put(self, rows: list[Row]) -> None:
        """Write lines; raises :class:`DataError` when the disk does not take them (what was there stays)."""
        head = [] if self._begun else [self.header]
        text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in [*head, *rows])

        def write() -> None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)

        self._guarded(write)
        self._begun = True
        self.rows += rows
        self._known.update(map(key, rows))

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise DataError(
                f"cannot write to {self.path}: {error.strerror or error}. Free some space or choose another --out; "
                "what was already measured there is kept."
            ) from None
