"""Discs over several devices (CLEAR's patch-parallel inference): each holds a strip of image rows and borders of its neighbours.

A strip's image tokens need the keys of the text, of their own rows and of ``radius − 1`` rows on either side: exact. Text
queries see the whole image, so every device attends from them to its own rows and the parts are joined: exactly, by
log-sum-exp with the text keys counted once, or by CLEAR's average (Eq. 7), which counts text keys once per device.

:func:`strip_attention` is what one device computes; :func:`patch_parallel` plays all of them in one process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError
from ..kernels.call import AttentionCall
from ..kernels.dispatch import check_tensors, compute
from ..kernels.merge import merge
from .disc import Disc
from .near import near_layout

TextMerge = Literal["exact", "mean"]


@dataclass(frozen=True)
class Strip:
    """Rows of one device.

    Attributes:
        first, stop: its own image rows ``[first, stop)``.
        above, below: rows that it needs from the neighbour on that side.
    """

    first: int
    stop: int
    above: int
    below: int


def strips(disc: Disc, grid: tuple[int, int], count: int) -> list[Strip]:
    """Equal strips of the image, top to bottom.

    Raises:
        ConfigError: ``count`` does not divide the height, a strip is lower than the border of ``radius − 1`` rows (the paper
            has no figure there either), or the disc is in tile order.
    """
    height, halo = grid[0], disc.radius - 1
    if disc.tile is not None:
        raise ConfigError(f"Disc.tile is {disc.tile!r}; expected None: strips are rows of a row-major image.")
    if count < 1 or height % count:
        raise ConfigError(f"count is {count}; expected a number of strips that divides the height, {height}.")
    rows = height // count
    if count > 1 and rows < halo:
        raise ConfigError(
            f"count is {count}, strips of {rows} rows; expected at least {halo} rows, the border of radius {disc.radius}, "
            "so that only neighbours exchange."
        )
    return [Strip(a, a + rows, min(halo, a), min(halo, height - a - rows)) for a in range(0, height, rows)]


def strip_attention(
    disc: Disc,
    width: int,
    strip: Strip,
    q: Tensor,
    text_kv: tuple[Tensor, Tensor],
    image_kv: tuple[Tensor, Tensor],
    *,
    owns_text: bool,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What one device computes.

    Args:
        disc: the pattern; width: of the image in tokens; strip: this device's rows.
        q: ``(B, H, text + own tokens, D)``, text queries first.
        text_kv: keys and values of the text. image_kv: of the rows ``above``, its own, and the rows ``below``.
        owns_text: whether this device's part of the text queries counts the text keys.

    Returns:
        Output of its image queries ``(B, H, own tokens, Dv)``, and output and lse of its part of the text queries.
    """
    text, own = text_kv[0].shape[2], (strip.stop - strip.first) * width
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    k, v = (torch.cat(pair, 2) for pair in zip(text_kv, image_kv, strict=True))
    rows = strip.above + strip.stop - strip.first + strip.below
    places = disc.places((rows, width), text + rows * width).to(q.device)
    mine = slice(text + strip.above * width, text + strip.above * width + own)
    base = BaseMask.build(own, k.shape[2], causal=False, device=q.device)
    layout = near_layout(places[mine], places, disc.radius**2)
    image, _ = compute(AttentionCall(q[:, :, text:], k, v, layout, base, scale))
    part_k, part_v = k[:, :, mine], v[:, :, mine]
    if owns_text:
        part_k, part_v = (torch.cat([t, p], 2) for t, p in zip(text_kv, (part_k, part_v), strict=True))
    base = BaseMask.build(text, part_k.shape[2], causal=False, device=q.device)
    part, lse = compute(AttentionCall(q[:, :, :text], part_k, part_v, None, base, scale))
    assert lse is not None
    return image, part, lse


def patch_parallel(
    disc: Disc,
    grid: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: int,
    text: TextMerge = "exact",
    scale: float | None = None,
) -> Tensor:
    """Attention of ``count`` devices, one after the other in this process.

    Args:
        disc: the pattern, row-major; grid: ``(height, width)`` of the image.
        q, k, v: ``(B, heads, text + height·width, ·)``.
        count: devices; must divide the height.
        text: how text queries are joined: ``"exact"``, or ``"mean"`` as in the paper.

    Returns:
        ``(B, H, text + height·width, Dv)``; with ``"exact"`` equal to one device up to rounding.

    Raises:
        ConfigError: strips that do not fit (see :func:`strips`), or another ``text``. ShapeError: tensors that do not fit.
    """
    check_tensors(q, k, v)
    if text not in ("exact", "mean"):
        raise ConfigError(f"text is {text!r}; expected 'exact' or 'mean'.")
    if len(grid) != 2 or min(grid) < 1 or disc.grid not in (None, tuple(grid), (-1, grid[1])):
        raise ConfigError(
            f"grid is {grid!r} and the pattern's {disc.grid!r}; expected (height, width) of at least 1 each, and the same where the pattern has one."
        )
    width, t = grid[1], disc.text
    if not q.shape[2] == k.shape[2] == t + math.prod(grid):
        raise ShapeError(
            f"q and k have {q.shape[2]} and {k.shape[2]} tokens; expected {t + math.prod(grid)}: text {t}, grid {grid!r}."
        )
    images, parts, lses = [], [], []
    for number, strip in enumerate(strips(disc, grid, count)):
        own = slice(t + strip.first * width, t + strip.stop * width)
        with_borders = slice(own.start - strip.above * width, own.stop + strip.below * width)
        image, part, lse = strip_attention(
            disc,
            width,
            strip,
            torch.cat([q[:, :, :t], q[:, :, own]], 2),
            (k[:, :, :t], v[:, :, :t]),
            (k[:, :, with_borders], v[:, :, with_borders]),
            owns_text=number == 0 or text == "mean",
            scale=scale,
        )
        images.append(image)
        parts.append(part)
        lses.append(lse)
    joined = merge(parts, lses)[0] if text == "exact" else torch.stack(parts).mean(0)
    return torch.cat([joined, *images], 2)


def exchanged(disc: Disc, grid: tuple[int, int], count: int) -> tuple[int, int]:
    """Image tokens whose keys and values travel for one layer: ``(borders of all strips, all-gather of the whole image)``."""
    borders = sum(s.above + s.below for s in strips(disc, grid, count)) * grid[1]
    return borders, math.prod(grid) * (count - 1)
