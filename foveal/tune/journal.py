"""What has been measured so far, one JSON line each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import DataError


class Journal:
    """An append-only file of ``(key, value)`` measurements.

    A journal that belongs to other options, another model or another text is set aside (renamed), never mixed in. A half
    written last line, which an interruption leaves, is dropped.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self.session = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not self._read(digest):
                path.replace(path.with_name(path.name + ".old"))
                self._values.clear()
            if not path.exists():
                self._append({"digest": digest})
        except OSError as error:
            raise _cannot_write(path, error) from None
        self.session = 1 + max((v.get("session", 0) for v in self._values.values() if isinstance(v, dict)), default=0)

    def _read(self, digest: str) -> bool:
        good: list[str] = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").splitlines()):
            try:
                entry = json.loads(line)
                if number == 0:
                    if entry["digest"] != digest:
                        return False
                else:
                    self._values[entry["key"]] = entry["value"]
            except (json.JSONDecodeError, KeyError, TypeError):
                break
            good.append(line)
        if not good:
            return False
        self.path.write_text("\n".join(good) + "\n", encoding="utf-8")
        return True

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        """Keys in the order in which they were measured."""
        return iter(list(self._values))

    def put(self, key: str, value: dict[str, Any]) -> None:
        """Record a measurement; raises :class:`DataError` when the disk does not take it (what was there stays)."""
        value = {**value, "session": self.session}
        try:
            self._append({"key": key, "value": value})
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        self._values[key] = value

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write to {path.parent}: {error.strerror or error}. Free some space or choose another folder with --out; "
        "what was already measured there is kept."
    )


def write_whole(path: Path, text: str) -> None:
    """Write a file completely or not at all; raises :class:`DataError` when it cannot be written."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise _cannot_write(path, error) from None
