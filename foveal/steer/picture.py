"""From a map over a picture to the picture that is asked about again: threshold, regions, mask, crop; and how complex a picture is."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import ConfigError, ShapeError, UnsupportedError

Pixels = NDArray[np.uint8]
"""``(H, W, 3)``"""


def pixels_of(image: Any) -> Pixels:
    """A Pillow image or an array as ``(H, W, 3)`` uint8."""
    if hasattr(image, "convert"):
        image = image.convert("RGB")
    out = np.asarray(image)
    if out.ndim != 3 or out.shape[2] != 3 or out.dtype != np.uint8:
        raise ShapeError(
            f"image has shape {out.shape} and dtype {out.dtype}; expected a Pillow image or uint8 (H, W, 3)."
        )
    return out


def top_pixels(scores: Tensor, share: float) -> Tensor:
    """``(H, W)`` bool: exactly ⌈share · HW⌉ pixels with the highest scores; ties go to the pixel that comes first.

    Pixels of score −inf are never kept and do not count.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"p is {share}; expected above 0 to 1, the share of pixels kept.")
    flat = scores.flatten()
    counted = int(torch.isfinite(flat).sum())
    kept = torch.zeros(flat.shape, dtype=torch.bool)
    kept[flat.argsort(descending=True, stable=True)[: math.ceil(share * counted - 1e-9)]] = True
    return kept.view(scores.shape)


def regions(kept: Tensor, scores: Tensor, most: int | None) -> Tensor:
    """The ``most`` connected regions (8 neighbours) of ``kept`` with the largest sums of scores; None keeps the released code's number,
    at least 3 or a fifth of all.

    Raises:
        UnsupportedError: SciPy is not installed.
    """
    try:
        from scipy.ndimage import label
    except ImportError:
        raise UnsupportedError(
            "finding regions needs SciPy, which is not installed: pip install 'foveal[data]'."
        ) from None
    found, count = label(kept.numpy(), structure=np.ones((3, 3)))
    labels = torch.from_numpy(found.astype(np.int64))
    most = max(3, int(0.2 * count)) if most is None else most
    if most < 1:
        raise ConfigError(f"K is {most}; expected at least 1 region.")
    values = torch.where(kept, scores, 0.0).double()
    sums = torch.zeros(count + 1, dtype=torch.float64).index_add(0, labels.flatten(), values.flatten())
    best = sums[1:].argsort(descending=True, stable=True)[:most] + 1
    return torch.isin(labels, best)


def bounding_box(mask: Tensor) -> tuple[int, int, int, int]:
    """``(left, top, right, bottom)`` of True pixels, right and bottom exclusive; of nothing, the whole picture."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if len(rows) == 0:
        return 0, 0, mask.shape[1], mask.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def resized(image: Pixels, width: int, height: int) -> Pixels:
    """Bilinear, with antialiasing; the same array when nothing changes."""
    if image.shape[:2] == (height, width):
        return image
    x = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
    x = torch.nn.functional.interpolate(x, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return x[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()


def refined_picture(
    image: Pixels, mask: Tensor, *, fill: tuple[int, int, int] = (0, 0, 0), crop: bool = True, canvas: bool = False
) -> tuple[Pixels, tuple[int, int, int, int]]:
    """Fill what lies outside the mask, cut its bounding box out, and enlarge it as far as the picture's size allows.

    Args:
        image: ``(H, W, 3)``; mask: ``(H, W)`` bool. fill: colour outside. crop: False only fills.
        canvas: put the result in the middle of a picture of the original size.

    Returns:
        The picture, and the box that it shows. A mask of all True gives the same pixels.
    """
    height, width = image.shape[:2]
    if tuple(mask.shape) != (height, width):
        raise ShapeError(f"mask has shape {tuple(mask.shape)}; expected {(height, width)}.")
    colour = np.array(fill, dtype=np.uint8)
    out = np.where(mask.numpy()[..., None], image, colour)
    if not crop:
        return out, (0, 0, width, height)
    left, top, right, bottom = box = bounding_box(mask)
    part = out[top:bottom, left:right]
    factor = min(width / (right - left), height / (bottom - top))
    part = resized(part, max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor)))
    if canvas and part.shape[:2] != (height, width):
        whole = np.broadcast_to(colour, image.shape).copy()
        y, x = (height - part.shape[0]) // 2, (width - part.shape[1]) // 2
        whole[y : y + part.shape[0], x : x + part.shape[1]] = part
        part = whole
    return part, box


def texture_complexity(image: Any, low: float = 50.0, high: float = 100.0) -> float:
    """Share of edge pixels after Canny's steps (blur, Sobel, thinning along the gradient, hysteresis between two thresholds).

    Raises:
        UnsupportedError: SciPy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError:
        raise UnsupportedError("edges need SciPy, which is not installed: pip install 'foveal[data]'.") from None
    grey = ndimage.gaussian_filter(pixels_of(image).astype(np.float64) @ np.array([0.299, 0.587, 0.114]), 1.0)
    dy, dx = ndimage.sobel(grey, 0), ndimage.sobel(grey, 1)
    size = np.hypot(dx, dy)
    sector = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    thin = np.zeros(size.shape, dtype=bool)
    padded = np.pad(size, 1)
    h, w = size.shape
    for number, (y, x) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        ahead = padded[1 + y : 1 + y + h, 1 + x : 1 + x + w]
        behind = padded[1 - y : 1 - y + h, 1 - x : 1 - x + w]
        thin |= (sector == number) & (size >= ahead) & (size > behind)
    strong = thin & (size >= high)
    labels, _ = ndimage.label(thin & (size >= low), structure=np.ones((3, 3)))
    edges = np.isin(labels, np.unique(labels[strong])) & (labels > 0)
    return float(edges.mean())


def colour_complexity(image: Any) -> float:
    """Entropy of the hue histogram of 180 bins of two degrees over its largest value ln 180: 0 for one hue, 1 for all alike."""
    rgb = pixels_of(image).astype(np.float64)
    top, low = rgb.max(-1), rgb.min(-1)
    span = np.where(top > low, top - low, 1.0)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    hue = np.where(top == r, (g - b) / span, np.where(top == g, 2 + (b - r) / span, 4 + (r - g) / span))
    bins = np.floor(np.where(top > low, hue % 6, 0.0) * 30).astype(int) % 180
    rho = np.bincount(bins.ravel(), minlength=180) / bins.size
    return float(-(rho[rho > 0] * np.log(rho[rho > 0])).sum() / math.log(180)) + 0.0
