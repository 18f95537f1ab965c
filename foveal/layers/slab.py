"""Simplified linear attention (SLA) of SLAB (arXiv 2405.11582), and its parts for the backbones.

Per head: ``O = ReLU(q)·Σ ReLU(k + P)ᵀ v / (ReLU(q)·Σ ReLU(k + P) + 1e-6) + DWC(v)`` with P a learned table that begins at zero and
DWC a depthwise 5×5 convolution over the token grid, its weights shared by all heads. No 1/√d; sums in float32.

The norms of the same paper: :mod:`foveal.layers.prepbn` and :mod:`foveal.layers.norm_fold`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError
from ..kernels.linear import LinearState, linear_attention

Order = Literal["auto", "kv", "qk"]
EPS = 1e-6


def cheaper_order(q_len: int, k_len: int, head_dim: int) -> Order:
    """Which product comes first: keys with values (``"kv"``), or queries with keys (``"qk"``, quadratic)."""
    return "kv" if q_len * k_len * 2 * head_dim > head_dim * head_dim * (q_len + k_len) else "qk"


class SimplifiedLinearAttention(nn.Module):
    """SLA in the place of a vision transformer's self-attention.

    Args:
        dim: width. num_heads: a divisor of it. grid: rows and columns of tokens for which P is learned.
        qkv_bias: of the projections. kernel_size: of DWC, odd.
        order: which product comes first; ``"auto"`` takes the cheaper one.

    Raises:
        ConfigError: sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        qkv_bias: bool = True,
        kernel_size: int = 5,
        order: Order = "auto",
    ) -> None:
        super().__init__()
        _check_sizes(type(self).__name__, dim, num_heads, kernel_size)
        if kernel_size % 2 == 0 or order not in ("auto", "kv", "qk"):
            raise ConfigError(
                f"SimplifiedLinearAttention has kernel_size={kernel_size}, order={order!r}; expected an odd size, and 'auto', 'kv' or 'qk'."
            )
        self.num_heads, self.grid, self.order = num_heads, grid, order
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.position = nn.Parameter(torch.zeros(1, grid[0] * grid[1], dim))
        head_dim = dim // num_heads
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim)

    def reset_special(self) -> None:
        """P to zero and DWC to PyTorch's initial weights; for backbones that initialise every matrix alike."""
        nn.init.zeros_(self.position)
        self.dwc.reset_parameters()

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """``(B, N, dim)`` in and out; ``grid`` of the tokens when it is not the learned one: P is then interpolated.

        Raises:
            ShapeError: N is not rows times columns.
        """
        rows, columns = self.grid if grid is None else grid
        if x.dim() != 3 or x.shape[-1] != self.out.in_features or x.shape[1] != rows * columns:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected (batch, {rows * columns}, {self.out.in_features}) for a grid of {rows} × {columns} tokens. Pass grid=(rows, columns) for another size."
            )
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (_heads(t, self.num_heads) for t in (q, k + self._position(rows, columns).to(k.dtype), v))
        order = cheaper_order(x.shape[1], x.shape[1], q.shape[-1]) if self.order == "auto" else self.order
        out = simplified(q, k, v, order)
        image = v.flatten(0, 1).mT.unflatten(-1, (rows, columns))
        out = out + self.dwc(image).flatten(2).mT.unflatten(0, v.shape[:2]).to(out.dtype)
        return self.out(out.transpose(1, 2).flatten(2))

    def _position(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == self.grid:
            return self.position
        image = self.position.mT.unflatten(-1, self.grid)
        image = nn.functional.interpolate(image, (rows, columns), mode="bicubic", align_corners=False)
        return image.flatten(2).mT


def simplified(q: Tensor, k: Tensor, v: Tensor, order: Order = "kv") -> Tensor:
    """SLA's core over ``(B, H, N, d)``, without DWC, in v's dtype."""
    q, k = torch.relu(q), torch.relu(k)
    if order == "kv":
        return linear_attention(q, k, v.to(q.dtype), eps=EPS)[0].to(v.dtype)
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        pairs = q.to(wide) @ k.to(wide).mT
        return (pairs @ v.to(wide) / (pairs.sum(-1, keepdim=True) + EPS)).to(v.dtype)


@dataclass
class CausalMemory:
    """What the causal variant remembers: the state, and the last values ``(B, H, ≤ kernel_size − 1, d)``."""

    state: LinearState | None = None
    values: Tensor | None = None


class CausalSimplifiedLinearAttention(nn.Module):
    """An extension, not in the paper: SLA over earlier tokens, with a causal 1-D convolution of ``kernel_size`` values and no P.

    Decoding with a :class:`CausalMemory` costs the same for every token and equals one pass.
    """

    def __init__(self, dim: int, num_heads: int, *, qkv_bias: bool = False, kernel_size: int = 5) -> None:
        super().__init__()
        _check_sizes(type(self).__name__, dim, num_heads, kernel_size)
        self.num_heads, self.kernel_size = num_heads, kernel_size
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim, bias=qkv_bias)
        self.dwc = nn.Conv1d(dim // num_heads, dim // num_heads, kernel_size, groups=dim // num_heads)

    def forward(self, x: Tensor, memory: CausalMemory | None = None) -> Tensor:
        """``(B, N, dim)`` in and out; ``memory`` of earlier tokens grows in place."""
        if x.dim() != 3 or x.shape[-1] != self.out.in_features:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, length, {self.out.in_features}).")
        q, k, v = (_heads(t, self.num_heads) for t in self.qkv(x).chunk(3, -1))
        before = memory or CausalMemory()
        out, state = linear_attention(torch.relu(q), torch.relu(k), v, causal=True, eps=EPS, state=before.state)
        past = v.new_zeros(*v.shape[:2], self.kernel_size - 1, v.shape[-1]) if before.values is None else before.values
        line = torch.cat([past, v], 2)
        out = out + self.dwc(line.flatten(0, 1).mT).mT.unflatten(0, v.shape[:2]).to(out.dtype)
        if memory is not None:
            memory.state, memory.values = state, line[:, :, line.shape[2] - (self.kernel_size - 1) :]
        return self.out(out.transpose(1, 2).flatten(2))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _check_sizes(name: str, dim: int, num_heads: int, kernel_size: int) -> None:
    if num_heads < 1 or dim % num_heads or kernel_size < 1:
        raise ConfigError(
            f"{name} has dim={dim}, num_heads={num_heads}, kernel_size={kernel_size}; expected heads that divide dim, and a size of at least 1."
        )
