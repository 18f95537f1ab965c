"""FE-LSD's blocks that fuse two streams of feature maps (arXiv 2211.07365): a frame and its events, or any such pair.

Shallow fusion lets two streams exchange gated features and keeps both; decoder fusion makes one map of two, with attention whose
keys lie on a small grid. Forms and biases follow the authors' code. ``(B, C, H, W)`` throughout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError
from ..kernels.dispatch import attention


class Bottleneck(nn.Module):
    """``Res(x; g)``: BN-ReLU-1×1 to half, BN-ReLU-3×3, BN-ReLU-1×1, plus x; with ``groups=2`` two streams in one tensor stay apart.

    A 1×1 map replaces x in the sum where channels change.
    """

    def __init__(self, channels: int, out: int | None = None, groups: int = 1) -> None:
        super().__init__()
        out = channels if out is None else out
        half = out // 2
        if channels % groups or half % groups:
            raise ConfigError(
                f"Bottleneck has channels={channels}, out={out}, groups={groups}; expected groups that divide both halves."
            )
        self.body = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, half, 1, groups=groups),
            nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1, groups=groups),
            nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, out, 1, groups=groups),
        )  # fmt: skip
        self.skip = nn.Conv2d(channels, out, 1, groups=groups) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.body(x)


class ChannelGate(nn.Module):
    """``σ(MLP(avgpool f) + MLP(maxpool f))``, one MLP of 1×1 maps without biases: ``(B, C, 1, 1)``."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        inner = max(1, channels // reduction)
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False), nn.ReLU(), nn.Conv2d(inner, channels, 1, bias=False)
        )

    def forward(self, f: Tensor) -> Tensor:
        pooled = f.mean((2, 3), keepdim=True), f.amax((2, 3), keepdim=True)
        return torch.sigmoid(self.mlp(pooled[0]) + self.mlp(pooled[1]))


class ShallowFusion(nn.Module):
    """Two streams exchange gated features: ``a′ = a + Res_a(a + b ⊙ CA_b(f))``, ``b′ = b + Res_b(b + a ⊙ CA_a(f))``.

    ``f`` is a 1×1 map of both. The gate that reads a stream's name gates what leaves that stream; a enters its sum twice, by the
    outer skip and by the one inside Res.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.mix = nn.Conv2d(2 * channels, channels, 1)
        self.gate_a, self.gate_b = ChannelGate(channels), ChannelGate(channels)
        self.res_a, self.res_b = Bottleneck(channels), Bottleneck(channels)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Raises :class:`ShapeError` unless both are ``(B, channels, H, W)``."""
        check_pair(a, b, self.channels)
        f = self.mix(torch.cat([a, b], 1))
        return a + self.res_a(a + b * self.gate_b(f)), b + self.res_b(b + a * self.gate_a(f))


class PixelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of ``(B, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class _Patches(nn.Conv2d):
    """A convolution whose stride is its kernel, as a product of every patch: torch 2.13's own is wrong in bfloat16 on CPUs with AMX
    for 8 and 16 channels."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pixel_unshuffle(x, self.kernel_size[0]), self.weight.flatten(1)[..., None, None], self.bias)


class LightAttention(nn.Module):
    """Self-attention whose keys and values are reduced by a strided convolution, with learned key positions per row and column.

    ``softmax(q (k + P_h + P_w)ᵀ / √d)``; the figure calls the tables relative, they are absolute positions of keys.

    Args:
        channels: C. reduction: s, kernel and stride of the reducing convolution; 1 for none. size: height and width of the maps
            that the tables are made for; for other sizes they are interpolated. num_heads: of C / num_heads channels.

    Raises:
        ConfigError: heads that do not divide the channels, or a size that ``reduction`` does not divide.
    """

    def __init__(
        self, channels: int, reduction: int, size: tuple[int, int], num_heads: int = 8, impl: str = "auto"
    ) -> None:
        super().__init__()
        if num_heads < 1 or channels % num_heads or reduction < 1 or size[0] % reduction or size[1] % reduction:
            raise ConfigError(
                f"LightAttention has channels={channels}, num_heads={num_heads}, reduction={reduction}, size={size}; expected heads "
                "that divide the channels and a reduction that divides both sides."
            )
        self.num_heads, self.reduction, self.impl = num_heads, reduction, impl
        self.q, self.k, self.v = (nn.Conv2d(channels, channels, 1, bias=False) for _ in range(3))
        self.reduce = _Patches(channels, channels, reduction, stride=reduction) if reduction > 1 else None
        self.norm = PixelNorm(channels) if reduction > 1 else None
        self.out = nn.Conv2d(channels, channels, 1)
        d = channels // num_heads
        self.rows = nn.Parameter(torch.randn(num_heads, d, size[0] // reduction, 1))
        self.columns = nn.Parameter(torch.randn(num_heads, d, 1, size[1] // reduction))

    def forward(self, x: Tensor) -> Tensor:
        """Raises :class:`ShapeError` for maps that the reduction does not divide."""
        if x.shape[-2] % self.reduction or x.shape[-1] % self.reduction:
            raise ShapeError(
                f"x has {x.shape[-2]} × {x.shape[-1]} pixels; expected multiples of the reduction {self.reduction}."
            )
        less = x if self.reduce is None or self.norm is None else self.norm(self.reduce(x))
        k = self.k(less).unflatten(1, (self.num_heads, -1))
        k = k + self._places(less.shape[-2], less.shape[-1]).to(k.dtype)
        q, v = (t.unflatten(1, (self.num_heads, -1)) for t in (self.q(x), self.v(less)))
        y = attention(*(t.flatten(3).mT for t in (q, k, v)), impl=self.impl)
        return self.out(y.mT.flatten(1, 2).unflatten(-1, x.shape[-2:]))

    def _places(self, height: int, width: int) -> Tensor:
        rows: Tensor = self.rows
        columns: Tensor = self.columns
        if rows.shape[2] != height:
            rows = F.interpolate(rows, size=(height, 1), mode="bilinear", align_corners=False)
        if columns.shape[3] != width:
            columns = F.interpolate(columns, size=(1, width), mode="bilinear", align_corners=False)
        return rows + columns


class InvertedResidualFFN(nn.Module):
    """1×1 to 4C, GELU, BN; plus depth-wise 3×3, GELU, BN of it; 1×1 to C, BN."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        wide = ratio * channels
        self.up = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.GELU(), nn.BatchNorm2d(wide))
        self.depth = nn.Sequential(nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.GELU(), nn.BatchNorm2d(wide))
        self.down = nn.Sequential(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(x + self.depth(x))


class DecoderFusion(nn.Module):
    """One map of two: ``y = LN(Conv1×1([a; b]))``, ``y += MHSA(LN(y))``, ``y += IRFFN(LN(y))``, ``LN(y)``.

    Args:
        channels: C of each stream and of the result. reduction, size, num_heads, impl: of :class:`LightAttention`.
    """

    def __init__(
        self, channels: int, reduction: int, size: tuple[int, int], num_heads: int = 8, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.channels = channels
        self.mix = nn.Conv2d(2 * channels, channels, 1)
        self.norms = nn.ModuleList(PixelNorm(channels) for _ in range(4))
        self.attention = LightAttention(channels, reduction, size, num_heads, impl)
        self.ffn = InvertedResidualFFN(channels)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Raises :class:`ShapeError` unless both are ``(B, channels, H, W)``."""
        check_pair(a, b, self.channels)
        y = self.norms[0](self.mix(torch.cat([a, b], 1)))
        y = y + self.attention(self.norms[1](y))
        y = y + self.ffn(self.norms[2](y))
        return self.norms[3](y)


def check_pair(a: Tensor, b: Tensor, channels: int) -> None:
    """Raise :class:`ShapeError` unless ``a`` and ``b`` are equal in shape, ``(B, channels, H, W)``."""
    if a.dim() != 4 or a.shape[1] != channels or a.shape != b.shape:
        raise ShapeError(
            f"the streams have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (batch, {channels}, height, width) for both."
        )
