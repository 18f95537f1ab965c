"""Where a figure comes from: versions, machine, commit, date and command. Part of every result file."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from .machine import machine

PACKAGES = ("torch", "numpy", "transformers", "safetensors")
_HOUSE = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """What it takes to understand a figure later, as JSON values; without absolute paths, user or host names.

    Returns:
        ``foveal``, ``python`` and the versions of :data:`PACKAGES` (None when absent); ``machine`` (see
        :func:`foveal.core.machine.machine`, with ``threads`` and ``gpu`` when torch is loaded); ``git``: the
        ``commit`` and whether the package's code is ``dirty``, None outside a checkout; ``date`` in UTC; ``command``.
    """
    from .. import __version__

    return {
        "foveal": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "machine": {**machine(), **_torch_facts()},
        "git": git_state(_HOUSE),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command_line(sys.argv),
    }


def git_state(root: Path) -> dict[str, Any] | None:
    """``{"commit", "dirty"}`` of the checkout whose top folder is ``root``; None when it is no checkout, or git is absent.

    ``dirty`` says whether anything below ``foveal/`` or ``benchmarks/`` differs from the commit, results aside.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    commit = _git(root, "rev-parse", "HEAD")
    if not top or not commit or Path(top).resolve() != root.resolve():
        return None
    changed = _git(root, "status", "--porcelain", "--", "foveal", "benchmarks", ":!benchmarks/results")
    return {"commit": commit, "dirty": bool(changed)}


def command_line(argv: list[str]) -> str:
    """The command in one line; absolute paths are cut to their last part."""
    words = [Path(argv[0]).name if argv and argv[0] else "python"]
    for word in argv[1:]:
        flag, equals, value = word.partition("=")
        words.append(f"{flag}={_short(value)}" if equals and flag.startswith("-") else _short(word))
    return " ".join(words)


def _short(word: str) -> str:
    return Path(word).name if os.path.isabs(word) or word.startswith("~") else word


def _version(name: str) -> str | None:
    module = sys.modules.get(name)
    if isinstance(getattr(module, "__version__", None), str):
        return str(module.__version__)  # type: ignore[union-attr]
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_facts() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return {}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "gpu": gpu}


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
