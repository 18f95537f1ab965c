"""Rotary positions on any number of axes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError


def check_rotary_heads(owner: str, dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise :class:`ConfigError` unless heads divide ``dim``, have an even size, and key heads divide them; ``owner`` is named."""
    if dim % num_heads or num_heads % num_kv_heads or dim // num_heads % 2:
        raise ConfigError(
            f"{owner} has dim={dim}, num_heads={num_heads}, num_kv_heads={num_kv_heads}; expected heads of an even "
            "size that divide dim, and num_kv_heads that divide num_heads."
        )


def rotary(positions: Tensor, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """``(cos, sin)``, each ``(N, head_dim/2)`` float64: pairs of channels dealt to the axes in turn, slower and slower.

    Args:
        positions: ``(N, A)`` coordinates.
    """
    pairs, axes = head_dim // 2, positions.shape[1]
    number = torch.arange(pairs, device=positions.device)
    rank, count = torch.div(number, axes, rounding_mode="floor"), -(-pairs // axes)
    frequency = base ** (-rank.double() / count)
    angle = positions[:, number % axes].double() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of neighbouring channels of ``(B, H, N, D)``."""
    cos, sin = (t.to(x.dtype) for t in turn)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def rotate_halves(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channel ``i`` with channel ``i + R/2`` among the first R of ``(B, H, N, D)``: the order of Hugging Face weights.

    R is twice the width of ``turn``; channels from R on stay.
    """
    cos, sin = (t.to(x.dtype) for t in turn)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
