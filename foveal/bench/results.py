"""Result files: what was measured, with where it comes from, as JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..core.errors import DataError
from ..core.provenance import provenance


def load_average() -> float | None:
    """Running and waiting processes over the last minute; None where the system does not tell."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def write_result(path: Path | str, result: dict[str, Any]) -> Path:
    """Write ``result`` with ``provenance`` as indented JSON; the file appears whole or not at all.

    Args:
        path: the file, ending in ``.json``; its folder is made.
        result: JSON values. NaN and infinity are refused, because JSON has neither.

    Returns:
        The path.

    Raises:
        DataError: the folder cannot be written to, or ``result`` holds what JSON cannot.
    """
    path = Path(path)
    try:
        text = json.dumps({**result, "provenance": provenance()}, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the result for {path.name} is no JSON: {error}. Expected numbers, strings, lists and dicts; no NaN."
        ) from error
    whole = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.write_text(text, encoding="utf-8")
        whole.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}. Choose another file with --out.") from error
    return path


def rounded(value: Any, digits: int = 4) -> Any:
    """The same JSON value with floats cut to so many significant digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v, digits) for v in value]
    return value
