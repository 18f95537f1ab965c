"""The folder where foveal keeps what is expensive to make twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$FOVEAL_CACHE``, else ``$XDG_CACHE_HOME/foveal``, else ``~/.cache/foveal``; it need not exist yet."""
    own = os.environ.get("FOVEAL_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "foveal"


def folder_size(folder: Path) -> int:
    """Bytes in all files below ``folder``; 0 when it does not exist. Files that vanish meanwhile do not count."""
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += (Path(root) / name).stat().st_size
            except OSError:
                continue
    return total
