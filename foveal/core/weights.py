"""Files of learned tensors that patterns name in their JSON: safetensors, pinned by SHA-256."""

from __future__ import annotations

import hashlib
from pathlib import Path

from torch import Tensor

from .errors import ConfigError, FovealError


def file_sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: str, sha256: str, what: str, field: str) -> None:
    """Raise :class:`ConfigError` unless the file has the digest; ``what`` it is and the ``field`` that holds the digest go into the message."""
    found = file_sha256(path)
    if found != sha256:
        raise ConfigError(
            f"{what} {path} has SHA-256 {found}; expected {sha256 or 'one (it is empty)'}. Give {field} of the file that you mean."
        )


def read_tensors(
    path: str | Path, what: str, error: type[FovealError] = ConfigError
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that holds a ``what``; raises ``error`` when it cannot be read."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise error(f"{what}s are stored as safetensors, which is not installed: pip install 'foveal[hf]'.") from None
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as why:
        raise error(f"{what} {path} cannot be read: {why}.") from None
