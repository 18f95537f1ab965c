"""Single modules of other libraries, for comparison alone: imported without their package's own imports.

A package may need much that a comparison does not (timm needs torchvision, braindecode needs torchaudio and mne). Inside
:func:`borrowed` its folders are packages without content, so a submodule brings only what it imports itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

from ...core.errors import DataError


@contextmanager
def borrowed(*names: str) -> Iterator[list[ModuleType]]:
    """The modules of the given dotted names; when it ends, ``sys.modules`` is as before.

    Raises:
        DataError: a package, or something that a module imports, is not installed.
    """
    before = dict(sys.modules)
    try:
        yield [_load(name) for name in names]
    except ImportError as error:
        raise DataError(
            f"the comparison needs {names[0].split('.')[0]}: {error}. pip install --no-deps {names[0].split('.')[0]}"
            + (" einops" if names[0].startswith("braindecode") else "")
        ) from error
    finally:
        for key in set(sys.modules) - set(before):
            if key.split(".")[0] in {name.split(".")[0] for name in names}:
                del sys.modules[key]


def installed_version(package: str) -> str:
    """The package's version.

    Raises:
        DataError: it is not installed.
    """
    try:
        return version(package)
    except PackageNotFoundError as error:
        raise DataError(f"{package} is not installed: pip install --no-deps {package}") from error


def _load(name: str) -> ModuleType:
    parts = name.split(".")
    if parts[0] not in sys.modules:
        spec = importlib.util.find_spec(parts[0])
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"No module named {parts[0]!r}")
        folder = Path(next(iter(spec.submodule_search_locations)))
        for depth in range(1, len(parts)):
            shell = ModuleType(".".join(parts[:depth]))
            shell.__path__ = [str(folder.joinpath(*parts[1:depth]))]
            sys.modules.setdefault(shell.__name__, shell)
    return importlib.import_module(name)
