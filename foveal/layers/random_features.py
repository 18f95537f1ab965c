"""Random features of the exponential kernel: ``E[φ(x)·φ(y)] = exp(x·y)``.

Positive (PRF): φ(x) = m^-½ exp(−‖x‖²/2) [exp(w_1·x), …, exp(w_m·x)]. Trigonometric (TRF): φ(x) = m^-½ exp(+‖x‖²/2) [sin(w_r·x) …,
cos(w_r·x) …], 2m values whose products can be negative. The variance of PRF is ``(exp(‖x + y‖²) − 1) exp(x·y)² / m``: exponential
in the norms.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, nearest

Draw = Literal["orthogonal", "gaussian", "sphere"]
DRAWS = ("orthogonal", "gaussian", "sphere")


def draw_directions(
    heads: int, count: int, dim: int, how: Draw = "orthogonal", *, generator: torch.Generator | None = None
) -> Tensor:
    """``(heads, count, dim)`` float32 directions w.

    Args:
        how: ``"gaussian"``: independent N(0, I). ``"sphere"``: independent, of norm √dim. ``"orthogonal"``: blocks of ``dim``
            orthogonal directions, each with the norm of a Gaussian one, so that every single one is N(0, I).
        generator: of the draw; None takes torch's own.

    Raises:
        ConfigError: sizes below 1 or an unknown ``how``.
    """
    if how not in DRAWS:
        raise ConfigError(f"features is {how!r}. {nearest(str(how), DRAWS)}")
    if min(heads, count, dim) < 1:
        raise ConfigError(f"draw_directions has heads={heads}, count={count}, dim={dim}; expected at least 1 of each.")
    w = torch.randn(heads, count, dim, generator=generator)
    if how == "gaussian":
        return w
    if how == "sphere":
        return w * (dim**0.5 / w.norm(dim=-1, keepdim=True))
    blocks = -(-count // dim)
    square = torch.randn(heads, blocks, dim, dim, generator=generator)
    q, r = torch.linalg.qr(square)
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1))[..., None, :]  # uniform over rotations
    return q.mT.flatten(1, 2)[:, :count] * w.norm(dim=-1, keepdim=True)


def positive_features(x: Tensor, w: Tensor, *, shift_rows: bool = False) -> Tensor:
    """PRF of ``x`` ``(B, H, N, d)`` with ``w`` ``(H or 1, m, d)``: ``(B, H, N, m)``, in float32 at least.

    ``shift_rows`` divides each row by its largest feature: for queries, whose scale cancels in normalised attention.
    """
    x, w = _wide(x, w)
    logs = x @ w.mT - x.square().sum(-1, keepdim=True) / 2
    if shift_rows:
        logs = logs - logs.detach().amax(-1, keepdim=True)
    return logs.exp() * w.shape[-2] ** -0.5


def trigonometric_features(x: Tensor, w: Tensor) -> Tensor:
    """TRF of ``x`` ``(B, H, N, d)`` with ``w`` ``(H or 1, m, d)``: ``(B, H, N, 2m)``, in float32 at least."""
    x, w = _wide(x, w)
    angle = x @ w.mT
    size = (x.square().sum(-1, keepdim=True) / 2).exp() * w.shape[-2] ** -0.5
    return torch.cat([angle.sin(), angle.cos()], -1) * size


def _wide(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), w.to(dtype)
