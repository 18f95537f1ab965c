"""Who attends to whom. Every module here that registers a pattern is found by itself; this list only re-exports names."""

from ..core.registry import entries as _entries
from .base import LookAhead, Pattern

__all__ = ["LookAhead", "Pattern", "names"]


def names() -> dict[str, type[Pattern]]:
    """All patterns by registered name."""
    return _entries("pattern")


def __getattr__(name: str) -> type[Pattern]:
    for cls in names().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module 'foveal.patterns' has no attribute {name!r}")
