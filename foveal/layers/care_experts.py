"""CARE-Edit's four condition experts and its mask refiner (arXiv 2603.08589).

Each expert returns what it adds to ``h``; the last map of every adapter starts at zero, so nothing is added at first:

    text  A(CrossAttn(h, C_p));  base  A(CrossAttn(h, Z_b));  ref  A(FiLM(h, Z_r));  mask  A(Conv(h ⊙ Up(Z_m ⊙ M̂)))
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, nearest
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute

Residual = Literal["signed", "paper"]


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """``(B, C, H, W)`` to another size: area means where it shrinks, bilinear where it grows."""
    if tuple(x.shape[-2:]) == size:
        return x
    down = (min(x.shape[-2], size[0]), min(x.shape[-1], size[1]))
    x = F.adaptive_avg_pool2d(x, down)
    return x if tuple(x.shape[-2:]) == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """``(B, H·W, C)`` → ``(B, C, H, W)``."""
    return x.mT.unflatten(-1, grid)


def needed(wanted: Tensor, grid: tuple[int, int]) -> Tensor:
    """Indices ``(B, n)`` of the ``wanted`` tokens ``(B, N)`` and of their neighbours, which an adapter's convolution reads; rows
    with fewer are filled up with other tokens."""
    near = F.max_pool2d(wanted.float().unflatten(1, grid)[:, None], 3, 1, 1)[:, 0].flatten(1) > 0
    return (~near).byte().argsort(dim=1, stable=True)[:, : int(near.sum(1).max())]


class Adapter(nn.Module):
    """Down to ``dim / 8``, a depth-wise 3 × 3 convolution on the token grid, GELU, layer norm, and a linear map from zero."""

    def __init__(self, dim: int, bottleneck: int | None = None) -> None:
        super().__init__()
        width = max(1, dim // 8) if bottleneck is None else bottleneck
        self.down = nn.Linear(dim, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, dim)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.conv(to_map(self.down(x), grid)).flatten(2).mT
        return self.up(self.norm(F.gelu(x)))


class CrossExpert(nn.Module):
    """Attention to a condition's tokens, then the adapter."""

    def __init__(self, dim: int, num_heads: int, impl: str = "auto") -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"CrossExpert.num_heads is {num_heads}; expected a divisor of dim {dim}.")
        self.num_heads, self.impl = num_heads, impl
        self.norm = nn.LayerNorm(dim)
        self.q, self.kv, self.adapter = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), Adapter(dim)

    def forward(
        self,
        h: Tensor,
        grid: tuple[int, int],
        condition: Tensor,
        valid: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """What is added to ``h`` ``(B, N, dim)``.

        Args:
            condition: ``(B, M, dim)``. valid: ``(B, M)`` bool. rows: ``(B, n)`` tokens to attend for, from :func:`needed`; the
                result then means something only where it was wanted.
        """
        if rows is None:
            return self.adapter(self.attend(h, condition, valid), grid)
        at = rows[..., None].expand(-1, -1, h.shape[-1])
        some = self.attend(h.gather(1, at), condition, valid)
        return self.adapter(torch.zeros_like(h, dtype=some.dtype).scatter(1, at, some), grid)

    def attend(self, h: Tensor, condition: Tensor, valid: Tensor | None) -> Tensor:
        """Cross-attention ``(B, n, dim)``, one row independent of the others."""
        q = self.q(self.norm(h)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(condition).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        base = BaseMask.build(q.shape[2], k.shape[2], causal=False, valid=valid, device=h.device)
        call = AttentionCall(q, k, v, None, base, q.shape[-1] ** -0.5, return_lse=False)
        return compute(call, self.impl)[0].transpose(1, 2).flatten(2)


class ReferenceExpert(nn.Module):
    """FiLM by the mean of the reference's tokens, then the adapter."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.film, self.adapter = nn.Linear(dim, 2 * dim), Adapter(dim)

    def forward(self, h: Tensor, grid: tuple[int, int], condition: Tensor) -> Tensor:
        scale, shift = self.film(condition.mean(1, keepdim=True)).chunk(2, -1)
        return self.adapter(h * (1 + scale) + shift, grid)


class MaskExpert(nn.Module):
    """A 3 × 3 convolution of ``h ⊙ Up(Z_m ⊙ M̂)``, then the adapter."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.adapter = Adapter(dim)

    def forward(self, h: Tensor, grid: tuple[int, int], latent: Tensor, mask: Tensor) -> Tensor:
        """``latent`` ``(B, dim, h, w)`` and ``mask`` ``(B, 1, H, W)`` of any sizes."""
        field = resize(latent * resize(mask, (latent.shape[-2], latent.shape[-1])), grid)
        return self.adapter(self.conv(to_map(h, grid) * field).flatten(2).mT, grid)


class MaskRepaint(nn.Module):
    """``M̂ ← clip(M̂ + Δ, 0, 1)`` with Δ from ``[h ‖ Up(Z_r) ‖ M̂]``; its last map starts at zero.

    Args:
        dim: width. residual: ``"signed"`` Δ = tanh(·), which starts at 0 and may shrink the mask; ``"paper"`` Δ = σ(·), which is
            at least 0, a half at first, and makes every mask all ones within two steps.

    Raises:
        ConfigError: an unknown residual.
    """

    def __init__(self, dim: int, residual: Residual = "signed") -> None:
        super().__init__()
        if residual not in ("signed", "paper"):
            raise ConfigError(f"MaskRepaint.residual is {residual!r}. {nearest(str(residual), ('signed', 'paper'))}")
        self.residual = residual
        width = max(1, dim // 4)
        self.conv, self.out = nn.Conv2d(2 * dim + 1, width, 3, padding=1), nn.Conv2d(width, 1, 1)
        for parameter in self.out.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor, grid: tuple[int, int], reference: Tensor | None, mask: Tensor) -> Tensor:
        """The refined mask ``(B, 1, *grid)``; ``reference`` ``(B, dim, h, w)``, zeros when there is none."""
        tokens, mask = to_map(h, grid), resize(mask, grid).to(h.dtype)
        other = torch.zeros_like(tokens) if reference is None else resize(reference, grid)
        x = self.out(F.gelu(self.conv(torch.cat([tokens, other, mask], 1))))
        return (mask + (torch.tanh(x) if self.residual == "signed" else torch.sigmoid(x))).clamp(0, 1)
