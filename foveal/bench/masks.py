"""Named masks of the benchmark of kernels: the vocabulary of LongCA-bench (arXiv 2510.17896, table of masks).

``parse_masks("causal,full_sliding:window=256")`` gives :class:`MaskSpec` objects; ``spec.draw(length)`` gives one :class:`Mask` of that
length, which says the same thing in every form that a kernel wants: a predicate, intervals per row, a dense tensor, a layout, slices, and
the exact number of pairs. Lengths and windows are in tokens; ``window`` is the paper's, which does **not** count the query itself.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, nearest
from ..core.layouts import BlockMask
from .documents import check_distribution
from .slices import Slice

SEED = 42
"""The paper's fixed seed."""


@dataclass(frozen=True)
class Draw:
    """What a mask is drawn for.

    Attributes:
        length: tokens. kv_heads: key heads, each with a mask of its own where the family has one per head.
        make: where chance comes from, on the CPU.
    """

    length: int
    kv_heads: int
    make: torch.Generator

    def number(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both included."""
        return int(torch.randint(low, max(low, high) + 1, (1,), generator=self.make))


@dataclass(frozen=True)
class Plain:
    """A mask in the words of kernels that take no mask but options.

    Attributes:
        causal: no later key. window: keys to the left and right of a row, −1 for all.
        documents: lengths of packed documents, each by itself; ``()`` for one sequence.
    """

    causal: bool
    window: tuple[int, int] = (-1, -1)
    documents: tuple[int, ...] = ()


class Mask:
    """One mask of one length. Subclasses are the families; see :func:`families`."""

    name: ClassVar[str]
    letters: ClassVar[str]
    random: ClassVar[bool] = False
    """Whether two draws may differ."""
    length: int

    @classmethod
    def draw(cls, draw: Draw) -> Mask:
        """A mask of the family; keyword-only arguments are the options that a user may set."""
        raise NotImplementedError

    @property
    def heads(self) -> int:
        """Masks held: 1 for all heads, or one for each key head."""
        return 1

    def area(self) -> int:
        """Allowed pairs of all masks held, by the closed form."""
        raise NotImplementedError

    def pairs(self, rows: Tensor) -> Tensor:
        """``(heads, rows, T)`` bool: what these rows see."""
        raise NotImplementedError

    def layout(self, num_heads: int, device: torch.device | str = "cpu") -> tuple[BlockMask | None, BaseMask]:
        """What foveal's kernels take: a layout (None for none) and the intervals of the rows."""
        raise NotImplementedError

    def slices(self) -> list[list[Slice]]:
        """For each mask held, disjoint slices whose union it is."""
        raise NotImplementedError

    def plain(self) -> Plain | None:
        """The mask as options, or None where it needs more."""
        return None

    def facts(self) -> dict[str, Any]:
        """What was drawn, as JSON values."""
        return {}

    def dense(self) -> Tensor:
        """``(heads, T, T)`` bool: O(N²)."""
        return self.pairs(torch.arange(self.length))

    def total_area(self, num_heads: int) -> int:
        """Allowed pairs over ``num_heads`` query heads, which share the masks held in equal parts."""
        return self.area() * (num_heads // self.heads)


_table: dict[int, type[Mask]] = {}


def family(number: int, name: str, letters: str) -> Any:
    """Class decorator: a family by its number in the paper's table, its name here, and its letters there."""

    def add(cls: type[Mask]) -> type[Mask]:
        cls.name, cls.letters = name, letters
        _table[number] = cls
        return cls

    return add


_RANGES = {"window": (0, None), "prefix": (0, None), "block": (1, None), "mean_block": (128, None), "keep": (0.0, 1.0)}


@dataclass(frozen=True)
class MaskSpec:
    """A family with options, before a length is known; ``str()`` is what a user types."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{k}={v}" for k, v in self.options)])

    @property
    def random(self) -> bool:
        return families()[self.name].random

    def draw(self, length: int, kv_heads: int = 1, seed: int = SEED, number: int = 0) -> Mask:
        """Draw ``number`` of this mask; the same arguments give the same mask on every machine.

        Raises:
            ConfigError: the family has no mask of this length.
        """
        if length < 1:
            raise ConfigError(f"length is {length}; expected at least 1 token.")
        make = torch.Generator().manual_seed(seed + 1_000_003 * number)
        return families()[self.name].draw(Draw(length, kv_heads, make), **dict(self.options))


def families() -> dict[str, type[Mask]]:
    """All families by name, in the paper's order."""
    for module in ("static", "documents", "blocks"):
        importlib.import_module(f".masks_{module}", __package__)
    return {cls.name: cls for _, cls in sorted(_table.items())}


def parse_mask(text: str, defaults: dict[str, Any] | None = None) -> MaskSpec:
    """``name`` or ``name:option=value:…``.

    Args:
        text: the name of a family or its letters in the paper.
        defaults: options used where the family has them and ``text`` does not set them.

    Raises:
        ConfigError: an unknown name or option (with the nearest one), or a value out of range.
    """
    known = families()
    word, *settings = text.strip().split(":")
    by_letters = {cls.letters.lower(): name for name, cls in known.items()}
    name = by_letters.get(word.lower(), word.lower())
    if name not in known:
        raise ConfigError(f"mask {word!r} is unknown. {nearest(name, known)}")
    fields = {
        field.name: field
        for field in inspect.signature(known[name].draw).parameters.values()
        if field.kind is inspect.Parameter.KEYWORD_ONLY
    }
    chosen = {k: v for k, v in (defaults or {}).items() if k in fields}
    for setting in settings:
        option, equals, value = setting.partition("=")
        if option not in fields or not equals:
            expected = f"expected {', '.join(f'{f}=…' for f in fields)}." if fields else "it has no options."
            raise ConfigError(f"mask {text!r} sets {setting!r}; {expected}")
        chosen[option] = _value(name, option, value, type(fields[option].default))
    options = ((k, chosen[k]) for k in fields if k in chosen and chosen[k] != fields[k].default)
    return MaskSpec(name, tuple(options))


def _value(name: str, option: str, text: str, kind: type) -> Any:
    if kind is str:
        return check_distribution(text)
    try:
        value = kind(text)
    except ValueError:
        raise ConfigError(
            f"mask {name}: {option} is {text!r}; expected a {'whole ' if kind is int else ''}number."
        ) from None
    low, high = _RANGES[option]
    if value < low or (high is not None and value > high) or value != value:
        reach = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"mask {name}: {option} is {value}; expected a number {reach}.")
    return value


def parse_masks(names: str | Iterable[str], defaults: dict[str, Any] | None = None) -> list[MaskSpec]:
    """A comma-separated list, or ``all``, ``static`` (twelve) or ``sparse`` (two); raises as :func:`parse_mask`."""
    words = names.split(",") if isinstance(names, str) else list(names)
    found: list[MaskSpec] = []
    for word in (w.strip() for w in words):
        if not word:
            continue
        sparse = [name for name, cls in families().items() if cls.name.endswith("block_sparse")]
        groups = {"all": list(families()), "sparse": sparse, "static": [n for n in families() if n not in sparse]}
        found += [parse_mask(name, defaults) for name in groups.get(word.lower(), [word])]
    if not found:
        raise ConfigError("no mask is named; expected names such as causal,full_document, or all.")
    return list(dict.fromkeys(found))
