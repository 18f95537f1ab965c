"""Where a picture's tokens sit in it: the token grid, and the part of the picture that the processor lets the model see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError

Box = tuple[float, float, float, float]


def token_grid(model: nn.Module, inputs: Mapping[str, Any], image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Positions of one picture's tokens in raster order, and their grid ``(height, width)``.

    Args:
        model: a vision-language model. inputs: a request with one picture. image: ``(N,)`` bool, its image tokens.

    Raises:
        UnsupportedError: the tokens are no full grid that can be told from config and inputs.
    """
    config: Any = model.config
    at = image.nonzero()[:, 0]
    count = len(at)
    given = inputs.get("image_grid_thw")
    if given is not None:
        merge = int(getattr(config.vision_config, "spatial_merge_size", 1))
        frames, height, width = (int(n) for n in given[0])
        grid = (height // merge, width // merge)
        if given.shape[0] == 1 and frames == 1 and grid[0] * grid[1] == count:
            return at, grid
    else:
        one = getattr(config, "image_seq_length", None) or _tile(config)
        if isinstance(one, int) and one and count % one == 0 and count > one:
            at, count = at[-one:], one  # tiles, the whole picture last
        side = math.isqrt(count)
        if count and side * side == count:
            return at, (side, side)
    raise UnsupportedError(
        f"the prompt has {int(image.sum())} image tokens, which are not the grid of one picture for {type(model).__name__}; "
        "give one picture, and for Idefics3 or SmolVLM process it with do_image_splitting=False."
    )


def _tile(config: Any) -> int | None:
    """Tokens of one tile where a pixel shuffle makes them fewer (Idefics3, SmolVLM)."""
    factor = getattr(config, "scale_factor", None)
    vision: Any = config.vision_config
    if not isinstance(factor, int):
        return None
    return (vision.image_size // vision.patch_size // factor) ** 2


def visible_part(processor: Any, width: int, height: int) -> Box:
    """``(left, top, right, bottom)`` in pixels of the picture that the token grid covers, read from the processor's settings.

    A centre crop after a resize shows the middle; padding to a square reaches beyond the picture; anything else shows all.
    """
    image: Any = getattr(processor, "image_processor", processor)
    size, crop = _sides(getattr(image, "size", None)), _sides(getattr(image, "crop_size", None))
    if getattr(image, "do_center_crop", False) and crop:
        shortest = (getattr(image, "size", None) or {}).get("shortest_edge") if size is None else None
        if not getattr(image, "do_resize", False):
            scale_x = scale_y = 1.0
        elif shortest:
            scale_x = scale_y = shortest / min(width, height)
        else:
            scale_y, scale_x = (size[0] / height, size[1] / width) if size else (1.0, 1.0)
        half_w, half_h = crop[1] / scale_x / 2, crop[0] / scale_y / 2
        return width / 2 - half_w, height / 2 - half_h, width / 2 + half_w, height / 2 + half_h
    if getattr(image, "pads_to_square", False):
        side = max(width, height)
        left, top = (side - width) // 2, (side - height) // 2
        return float(-left), float(-top), float(side - left), float(side - top)
    return 0.0, 0.0, float(width), float(height)


def _sides(size: Any) -> tuple[int, int] | None:
    """``(height, width)`` of a processor's size, where it has both."""
    if isinstance(size, int):
        return size, size
    try:
        height, width = size["height"], size["width"]
    except (TypeError, KeyError, AttributeError):
        return None
    return (int(height), int(width)) if height and width else None


def painted(grid_map: Tensor, box: Box, width: int, height: int) -> Tensor:
    """A map ``(h, w)`` over the box, enlarged bilinearly onto a picture: ``(height, width)``, −inf where the grid does not reach."""
    left, top, right, bottom = (round(x) for x in box)
    span = (max(1, bottom - top), max(1, right - left))
    whole = torch.nn.functional.interpolate(grid_map[None, None].double(), span, mode="bilinear", align_corners=False)[
        0, 0
    ]
    out = torch.full((height, width), -torch.inf, dtype=torch.float64)
    y, x = max(top, 0), max(left, 0)
    part = whole[y - top : min(bottom, height) - top, x - left : min(right, width) - left]
    out[y : y + part.shape[0], x : x + part.shape[1]] = part
    return out
