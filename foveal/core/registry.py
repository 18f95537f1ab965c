"""Named things, found by importing the package that holds them: no central list to edit.

A module in ``foveal/patterns`` that says ``@register("pattern", "sliding_window")`` is known as soon as its package is
searched; adding a method is adding its file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import ConfigError, nearest

C = TypeVar("C")

_tables: dict[str, dict[str, Any]] = {}
_packages = {
    "pattern": "foveal.patterns",
    "operator": "foveal.patterns",
    "channel": "foveal.layers.channel",
    "task": "foveal.evals",
    "probe": "foveal.lens.probes",
}
_searched: set[str] = set()


def register(kind: str, name: str) -> Callable[[C], C]:
    """Class decorator: make the class known under ``name`` and store the name on it as ``registered_name``."""

    def add(item: C) -> C:
        table = _tables.setdefault(kind, {})
        known = table.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (item.__module__, item.__qualname__):  # type: ignore[attr-defined]
            raise ConfigError(f"{kind} {name!r} is registered twice: by {known!r} and {item!r}; rename one of them.")
        table[name] = item
        item.registered_name = name  # type: ignore[attr-defined]
        return item

    return add


def entries(kind: str) -> dict[str, Any]:
    """All registered classes of one kind, by name, sorted; imports the kind's package on first use."""
    package_name = _packages.get(kind)
    if package_name and kind not in _searched:
        _searched.add(kind)
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{package_name}.{module.name}")
    return dict(sorted(_tables.get(kind, {}).items()))


def lookup(kind: str, name: str, where: str = "") -> Any:
    """The class registered under ``name``; raises :class:`ConfigError` naming the nearest known name."""
    table = entries(kind)
    if name not in table:
        prefix = f"{where}: " if where else ""
        raise ConfigError(f"{prefix}unknown {kind} {name!r}. {nearest(name, table)}")
    return table[name]
