"""Arrays whose axes have names, on their way to NumPy, pandas or a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError, UnsupportedError, nearest

if TYPE_CHECKING:
    import pandas

VERSION = 1


@dataclass(frozen=True, eq=False)
class Labelled:
    """A tensor on the CPU with a name for every axis.

    Attributes:
        values: the figures; NaN where there is none (padding).
        dims: one name per axis, such as ``("layer", "head", "token")``.
        coords: per named axis the labels of its entries; an axis without an entry counts from 0.
    """

    values: Tensor
    dims: tuple[str, ...]
    coords: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.dims) != self.values.dim():
            raise ConfigError(
                f"values has {self.values.dim()} axes and dims names {len(self.dims)}: {', '.join(self.dims)}."
            )
        for name, labels in self.coords.items():
            if len(labels) != self.values.shape[self.axis(name)]:
                raise ConfigError(
                    f"coords[{name!r}] has {len(labels)} labels for an axis of {self.values.shape[self.axis(name)]}."
                )

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def axis(self, name: str) -> int:
        """Number of the axis; raises :class:`ConfigError` when there is none of that name."""
        if name not in self.dims:
            raise ConfigError(f"no axis is called {name!r}. {nearest(name, self.dims)}")
        return self.dims.index(name)

    def labels(self, name: str) -> tuple[Any, ...]:
        """Labels of an axis."""
        return self.coords.get(name, tuple(range(self.values.shape[self.axis(name)])))

    def select(self, **where: Any) -> Labelled:
        """The entries with these labels, without those axes: ``select(layer=3, head=0)``.

        Raises:
            ConfigError: no such axis or label.
        """
        out = self
        for name, label in where.items():
            axis, known = out.axis(name), out.labels(name)
            if label not in known:
                raise ConfigError(f"{name} is {label!r}; expected one of {known[0]!r} to {known[-1]!r}.")
            rest = tuple(d for d in out.dims if d != name)
            out = Labelled(
                out.values.select(axis, known.index(label)), rest, {n: c for n, c in out.coords.items() if n != name}
            )
        return out

    def numpy(self) -> np.ndarray:
        """The values as an array, without the names."""
        return self.values.numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def pandas(self, name: str = "value") -> pandas.Series:
        """A series with one index level per axis.

        Raises:
            UnsupportedError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UnsupportedError("tables need pandas: pip install pandas. Without it use numpy().") from error
        index = pandas.MultiIndex.from_product([self.labels(d) for d in self.dims], names=self.dims)
        return pandas.Series(self.numpy().reshape(-1), index=index, name=name)


def save(arrays: Mapping[str, Labelled], path: str | Path, facts: Mapping[str, Any] | None = None) -> None:
    """Write arrays to one safetensors file, names and labels in its header; the file appears whole or not at all.

    Args:
        facts: plain JSON values kept beside them.

    Raises:
        DataError: the file cannot be written.
    """
    from safetensors.torch import save_file

    header = {
        "version": VERSION,
        "arrays": {name: {"dims": a.dims, "coords": dict(a.coords)} for name, a in arrays.items()},
        "facts": dict(facts or {}),
    }
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        save_file({n: a.values.contiguous() for n, a in arrays.items()}, part, metadata={"foveal": json.dumps(header)})
        part.replace(path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}.") from None


def load(path: str | Path) -> dict[str, Labelled]:
    """Arrays that :func:`save` wrote.

    Raises:
        DataError: the file cannot be read, or foveal did not write it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("foveal", "null"))
            if not header or header.get("version") != VERSION:
                raise DataError(f"{path} holds no arrays of foveal's lens; expected a file that a recording saved.")
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    return {
        name: Labelled(values[name], tuple(of["dims"]), {d: tuple(c) for d, c in of["coords"].items()})
        for name, of in header["arrays"].items()
    }
