"""Reading a TOML table strictly: every complaint names the file, the key, what was received and what was expected."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from foveal.core.errors import ConfigError, nearest


class Fields:
    """One TOML table, read key by key; every complaint names the file and the full key."""

    def __init__(self, data: Mapping[str, Any], file: str, prefix: str) -> None:
        self.data, self.file, self.prefix = data, file, prefix

    def error(self, key: str, received: object, expected: str, hint: str = "") -> ConfigError:
        """The complaint that ``key`` is ``received`` where ``expected`` was due; the caller raises it."""
        kind = type(received).__name__
        text = f"{self.file}: {self.prefix}{key} is {received!r} ({kind}); expected {expected}. {hint}"
        return ConfigError(text.rstrip())

    def only(self, known: Iterable[str]) -> None:
        """Refuse every key that is not among ``known``."""
        names = set(known)
        for key in self.data:
            if key not in names:
                raise ConfigError(
                    f"{self.file}: unknown key {self.prefix}{key} = {self.data[key]!r}; expected one of the "
                    f"{len(names)} keys of the schema. {nearest(key, names)}"
                )

    def _get(self, key: str, expected: str) -> Any:
        if key not in self.data:
            there = ", ".join(self.data) or "none"
            raise ConfigError(
                f"{self.file}: the key {self.prefix}{key} is missing; expected {expected}; received: {there}"
            )
        return self.data[key]

    def integer(self, key: str) -> int:
        """The integer at ``key``; true and false are none."""
        value = self._get(key, "an integer")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, value, "an integer")
        return value

    def string(
        self,
        key: str,
        *,
        optional: bool = False,
        empty: bool = False,
        among: Iterable[str] = (),
        form: re.Pattern[str] | None = None,
        expected: str = "a text that is not empty",
    ) -> str:
        """The string at ``key``, stripped; empty only where ``optional`` or ``empty`` allow it."""
        if optional and key not in self.data:
            return ""
        value = self._get(key, expected)
        if not isinstance(value, str):
            raise self.error(key, value, f"a string: {expected}")
        value = value.strip()
        if not value and (optional or empty):
            return value
        return self._check(key, value, tuple(among), form, expected)

    def strings(
        self, key: str, *, among: Iterable[str] = (), form: re.Pattern[str] | None = None, expected: str = "a text"
    ) -> tuple[str, ...]:
        """The list of strings at ``key``, stripped, with at least one entry."""
        value = self._get(key, "a list of strings")
        if not isinstance(value, list) or not value:
            raise self.error(key, value, "a list of strings with at least one entry")
        for index, item in enumerate(value):
            if not isinstance(item, str):
                raise self.error(f"{key}[{index}]", item, f"a string: {expected}")
            self._check(f"{key}[{index}]", item.strip(), tuple(among), form, expected)
        if key != "authors" and len(set(value)) != len(value):  # two authors may share a name
            raise self.error(key, value, "no entry twice")
        return tuple(item.strip() for item in value)

    def tables(self, key: str, at_least: int) -> list[Fields]:
        """The tables at ``key``, each as fields of its own."""
        value = self._get(key, f"tables, each headed [[{key}]]")
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value) or len(value) < at_least:
            raise self.error(key, value, f"at least {at_least} tables, each headed [[{key}]]")
        return [Fields(item, self.file, f"{key}[{index}].") for index, item in enumerate(value)]

    def _check(self, key: str, value: str, among: tuple[str, ...], form: re.Pattern[str] | None, expected: str) -> str:
        if among and value not in among:
            raise self.error(key, value, "one of " + ", ".join(map(repr, among)), nearest(value, among))
        if not value or (form is not None and not form.fullmatch(value)):
            raise self.error(key, value, expected)
        return value
