"""Errors that teach: every message names the argument, what was received, what was expected, and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FovealError(Exception):
    """Base of every error that foveal raises on purpose; the command prints it and exits with code 2."""


class ShapeError(FovealError, ValueError):
    """A tensor has a shape, dtype or device that the call cannot use."""


class ConfigError(FovealError, ValueError):
    """A field of a pattern, policy or option is unknown, of the wrong type, or out of range."""


class UnsupportedError(FovealError, NotImplementedError):
    """The request is well formed, but this implementation, model family or machine cannot honour it."""


class ModelError(FovealError):
    """A model could not be found, read or recognised."""


class DataError(FovealError):
    """A text, file or result could not be read, or does not fit the request."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint such as ``Did you mean 'window'?`` or, without a near match, the sorted list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    shown = ", ".join(names) if len(names) <= 12 else ", ".join(names[:12]) + ", …"
    return f"Known names: {shown}." if names else "There are none."
