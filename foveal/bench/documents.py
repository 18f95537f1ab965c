"""Lengths of packed documents, drawn as LongCA-bench draws them (arXiv 2510.17896, data section and the authors' bins).

A distribution is a list of bins with weights, counted in whitespace words of real corpora: a bin is drawn by weight, then a whole
number uniformly inside it, until the sequence is full; the last document is cut. The printed probabilities sum to 0.9993 (Pile)
and 0.9998 (ProLong512K) from rounding, so weights are normalised.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest

Bins = tuple[tuple[int, ...], tuple[int, ...]]
"""Upper edges (exclusive; a bin begins where the one before ends, the first at 0) and weights."""


def _steps(first: int, last: int) -> tuple[int, ...]:
    return tuple(range(first, last + 1, 32))


DISTRIBUTIONS: dict[str, Bins] = {
    "pile": (
        (*_steps(32, 640), 704, 768, 832, 896, 960, 1056, 1152, 1280, 1440, 1600, 1792, 2016, 2304, 2720, 3264, 3904, 4704, 5792, 7584, 14208, 9323168),
        (
            299, 640, 649, 701, 717, 700, 677, 594, 537, 381, 307, 259, 224, 194, 172, 151, 136, 123, 111, 100,
            177, 154, 134, 116, 101, 130, 107, 118, 122, 100, 109, 109, 106, 106, 105, 101, 101, 102, 101, 100, 22,
        ),
    ),
    "prolong64k": (
        (64, *_steps(96, 864), 928, 992, 1056, 1120, 1184, 1280, 1376, 1504, 1632, 1792, 2016, 2304, 2720, 3392, 4768, 8928, 50272, 61920),
        (
            412, 544, 575, 557, 520, 483, 446, 414, 386, 350, 321, 301, 286, 267, 262, 247, 219, 199, 184, 168, 157, 147, 137, 127, 119,
            108, 192, 167, 153, 128, 109, 139, 113, 125, 104, 101, 110, 104, 102, 101, 101, 100, 100, 15,
        ),
    ),
    "prolong512k": (
        (*_steps(32, 832), 896, 960, 1024, 1088, 1152, 1248, 1344, 1472, 1632, 1824, 2080, 2464, 3104, 4544, 10912, 475872),
        (
            101, 360, 585, 628, 606, 562, 516, 470, 435, 398, 359, 326, 305, 285, 265, 263, 242, 213, 192, 176, 160, 149, 139, 128, 118,
            110, 192, 163, 148, 128, 107, 134, 109, 118, 119, 104, 104, 104, 104, 100, 100, 73,
        ),
    ),
}  # fmt: skip
"""Published bins; weights in 1e-4."""

CHOICES = ("auto", *DISTRIBUTIONS, "long")
"""``auto`` follows the length as in the paper's text; ``long`` is the mix of its distributed runs."""

_LONG_SHARE, _LONG_RANGE = 0.6, (8 << 10, 30 << 10)


def check_distribution(name: str) -> str:
    """The name, if there is such a distribution; raises :class:`ConfigError` with the nearest one."""
    if name not in CHOICES:
        raise ConfigError(
            f"documents is {name!r}; expected a distribution of document lengths. {nearest(name, CHOICES)}"
        )
    return name


def distribution_for(length: int) -> str:
    """What ``auto`` means: Pile up to 8K tokens, ProLong64K up to 64K, ProLong512K above."""
    return "pile" if length <= 8 << 10 else "prolong64k" if length <= 64 << 10 else "prolong512k"


def draw_lengths(name: str, count: int, make: torch.Generator) -> Tensor:
    """``(count,)`` int64 document lengths of a published distribution, at least 1, not cut to any sequence."""
    edges, weights = DISTRIBUTIONS[name]
    upper = torch.tensor(edges)
    lower = torch.cat([torch.zeros(1, dtype=torch.int64), upper[:-1]])
    bins = torch.multinomial(torch.tensor(weights, dtype=torch.float64), count, replacement=True, generator=make)
    inside = torch.rand(count, dtype=torch.float64, generator=make)
    low, high = lower[bins], upper[bins]
    return (low + (inside * (high - low)).long()).clamp(min=1)


def sample_documents(name: str, length: int, make: torch.Generator) -> tuple[int, ...]:
    """Document lengths that fill a sequence.

    Args:
        name: one of :data:`CHOICES`. ``long``: 40 % of the tokens from the distribution that ``auto`` means, 60 % from whole
            numbers of 8K to 30K, in random order.
        length: of the sequence. make: where chance comes from; it must be on the CPU.

    Returns:
        Lengths of at least 1 that sum to ``length``; the last one drawn is cut.

    Raises:
        ConfigError: no such distribution, or a length below 1.
    """
    check_distribution(name)
    if length < 1:
        raise ConfigError(f"length is {length}; expected at least 1 token.")
    base = distribution_for(length) if name in ("auto", "long") else name
    if name != "long":
        return tuple(_fill(length, lambda: draw_lengths(base, 64, make)))
    low, high = _LONG_RANGE
    long = int(_LONG_SHARE * length)
    parts = _fill(length - long, lambda: draw_lengths(base, 64, make))
    parts += _fill(long, lambda: torch.randint(low, high + 1, (64,), generator=make))
    return tuple(parts[i] for i in torch.randperm(len(parts), generator=make).tolist())


def _fill(length: int, draw: Callable[[], Tensor]) -> list[int]:
    """Lengths until ``length`` is full."""
    out: list[int] = []
    left = length
    while left > 0:
        for drawn in draw().tolist():
            out.append(min(int(drawn), left))
            left -= out[-1]
            if left <= 0:
                break
    return out


def starts(lengths: tuple[int, ...]) -> Tensor:
    """``(documents + 1,)`` int64 boundaries, from 0 to the sum."""
    return torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))
