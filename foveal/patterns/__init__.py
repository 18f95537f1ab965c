"""Who attends to whom. Every module here that registers a pattern is found by itself; this list only re-exports names."""

from typing import Any

from ..core.registry import entries as _entries
from .base import LookAhead, Pattern
from .operator import Operator, attend

__all__ = ["LookAhead", "Operator", "Pattern", "attend", "names", "operators"]


def names() -> dict[str, type[Pattern]]:
    """All patterns by registered name."""
    return _entries("pattern")


def operators() -> dict[str, type[Operator]]:
    """All operators by registered name."""
    return _entries("operator")


def __getattr__(name: str) -> Any:
    for cls in (*names().values(), *operators().values()):
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module 'foveal.patterns' has no attribute {name!r}")
