"""NPRF attention (arXiv 2106.12566): normalised positive random features with relative positions, in O(n log n).

``out_i = Σ_j e^{b_{j−i}} φ(q̃_i)·φ(k̃_j) v_j / Σ_j e^{b_{j−i}} φ(q̃_i)·φ(k̃_j)`` with ``q̃ = q/‖q‖``, ``k̃ = k/‖k‖`` and no 1/√d. The
softmax that it approximates, ``kernel="softmax"``, is the same layer with exact weights, so that one can be turned into the other
(:mod:`foveal.layers.nprf_convert`).

Ours, where the paper says nothing: a table per head, clipped at ``max_distance``; random directions per head, shared by queries and
keys, kept in a buffer and drawn anew only by :meth:`NPRFAttention.redraw`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError, UnsupportedError, nearest
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..kernels.linear import linear_attention
from ..kernels.toeplitz import PRECISIONS, SHORT, Precision
from ..kernels.toeplitz_attention import toeplitz_attention
from .random_features import Draw, draw_directions, positive_features, trigonometric_features

Kernel = Literal["prf", "trf", "softmax"]
KERNELS = ("prf", "trf", "softmax")
TRF_EPS = 1e-6
"""Least divisor over the largest one, for features whose products can be negative."""


class RelativeBias(nn.Module):
    """Learned scalars b_δ per head, δ = key − query clipped to ±``max_distance``; zeros at first. Layers may share one."""

    def __init__(self, num_heads: int, max_distance: int) -> None:
        super().__init__()
        if num_heads < 1 or max_distance < 1:
            raise ConfigError(
                f"RelativeBias has num_heads={num_heads}, max_distance={max_distance}; expected at least 1 of each."
            )
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.zeros(num_heads, 2 * max_distance + 1))

    def offsets(self, q_len: int, k_len: int) -> Tensor:
        """``(H, Nq + Nk − 1)`` biases of all offsets, queries aligned with the last keys."""
        delta = torch.arange(q_len + k_len - 1, device=self.table.device) - (k_len - 1)
        return self.table[:, delta.clamp(-self.max_distance, self.max_distance) + self.max_distance]


@dataclass
class NPRFMemory:
    """What a causal layer remembers of a request: mapped keys (keys, for softmax) and values ``(B, H, n, ·)``."""

    keys: Tensor | None = None
    values: Tensor | None = None


class NPRFAttention(nn.Module):
    """Self-attention by random features with relative positions.

    Args:
        dim: width. num_heads: a divisor of it.
        num_features: m random directions per head (TRF has 2m features).
        max_distance: where the relative bias is clipped; 0 for no bias, which makes it plain linear attention.
        causal: a token sees itself and earlier ones.
        normalised: ℓ2-normalise q and k; False scales them by d^-¼ each, as softmax attention's 1/√d does.
        kernel: ``"prf"``, ``"trf"`` (its divisor can come near zero: it is clamped), or ``"softmax"``, exact and O(n²).
        features: how directions are drawn; see :func:`~foveal.layers.random_features.draw_directions`.
        bias: a :class:`RelativeBias` shared with other layers, in the place of an own one.
        qkv_bias: of the projections. bias_limit: clamp b to ± this; ±5 keeps a causal float32 transform in bounds.
        precision: of the FFT. seed: of the first draw.

    Raises:
        ConfigError: sizes that do not divide each other, an unknown kernel, draw or precision.
    """

    directions: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_features: int = 64,
        *,
        max_distance: int = 128,
        causal: bool = False,
        normalised: bool = True,
        kernel: Kernel = "prf",
        features: Draw = "orthogonal",
        bias: RelativeBias | None = None,
        qkv_bias: bool = True,
        bias_limit: float | None = None,
        precision: Precision = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"NPRFAttention.num_heads is {num_heads}; expected a divisor of dim {dim}.")
        for name, value, known in (("kernel", kernel, KERNELS), ("precision", precision, PRECISIONS)):
            if value not in known:
                raise ConfigError(f"NPRFAttention.{name} is {value!r}. {nearest(str(value), known)}")
        if bias is not None and bias.table.shape[0] != num_heads:
            raise ConfigError(f"bias has {bias.table.shape[0]} heads; expected {num_heads}.")
        self.num_heads, self.head_dim, self.num_features = num_heads, dim // num_heads, num_features
        self.causal, self.normalised, self.kernel, self.features = causal, normalised, kernel, features
        self.bias_limit, self.precision = bias_limit, precision
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)
        self.bias = RelativeBias(num_heads, max_distance) if bias is None and max_distance else bias
        self.register_buffer("directions", torch.empty(num_heads, num_features, self.head_dim))
        self.redraw(seed)

    def redraw(self, seed: int) -> None:
        """Draw new directions. Cached keys of a memory do not fit them."""
        g = torch.Generator().manual_seed(seed)
        fresh = draw_directions(self.num_heads, self.num_features, self.head_dim, self.features, generator=g)
        self.directions.copy_(fresh)

    def forward(self, x: Tensor, *, valid: Tensor | None = None, memory: NPRFMemory | None = None) -> Tensor:
        """``(B, N, dim)`` in and out.

        Args:
            valid: ``(B, N)`` bool, False on padding.
            memory: of earlier tokens (causal, without padding); grows in place. One step costs O(n (m + d)): no state of constant
                size holds a general relative bias.

        Raises:
            ShapeError: x or valid of another shape. UnsupportedError: a memory without ``causal`` or with padding.
        """
        self._check(x, valid, memory)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        q, k = self.scaled(q), self.scaled(k)
        if self.kernel != "softmax":
            q, k = self.mapped(q, rows=True), self.mapped(k)
        if memory is not None:
            if memory.keys is not None and memory.values is not None:
                k, v = torch.cat([memory.keys, k], 2), torch.cat([memory.values, v], 2)
            memory.keys, memory.values = k, v
        out = self.attend(q, k, v, valid)
        if valid is not None:
            out = out.masked_fill(~valid[:, None, :, None], 0.0)
        return self.out(out.to(x.dtype).transpose(1, 2).flatten(2))

    def scaled(self, x: Tensor) -> Tensor:
        """Queries or keys ``(B, H, N, D)``, normalised (a zero vector stays zero) or times d^-¼."""
        return nn.functional.normalize(x, dim=-1, eps=1e-6) if self.normalised else x * self.head_dim**-0.25

    def mapped(self, x: Tensor, rows: bool = False) -> Tensor:
        """Features ``(B, H, N, m or 2m)`` of scaled queries (``rows``) or keys, in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            if self.kernel == "trf":
                return trigonometric_features(x, self.directions)
            return positive_features(x, self.directions, shift_rows=rows and not self.normalised)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Tensor:
        """``(B, H, Nq, D)`` from scaled q and k (softmax) or their features."""
        q_len, k_len = q.shape[2], k.shape[2]
        if self.kernel == "softmax":
            base = BaseMask.build(q_len, k_len, causal=self.causal, shift=k_len - q_len, valid=valid, device=q.device)
            table = None if self.bias is None else self._limited(self.bias.table)
            return compute(AttentionCall(q, k, v, None, base, 1.0, bias=table, return_lse=False))[0]
        if valid is not None:
            k, v = (t.masked_fill(~valid[:, None, :, None], 0.0) for t in (k, v))
        v = v.to(k.dtype)
        if self.bias is None and (not self.causal or q_len == k_len):
            return linear_attention(q, k, v, causal=self.causal)[0]
        return toeplitz_attention(
            q, k, v, self.weights(q_len, k_len), causal=self.causal, eps=TRF_EPS if self.kernel == "trf" else 0.0,
            precision="dense" if q_len <= SHORT else self.precision,
        )  # fmt: skip

    def weights(self, q_len: int, k_len: int) -> Tensor:
        """``(H, Nq + Nk − 1)`` e^b of all offsets, the largest visible one per head being 1."""
        if self.bias is None:
            return self.directions.new_ones(1, q_len + k_len - 1)
        b = self._limited(self.bias.offsets(q_len, k_len))
        seen = b[:, :k_len] if self.causal else b  # offsets up to Nk − Nq
        b = b - seen.detach().amax(-1, keepdim=True)
        return (b.clamp(max=0.0) if self.causal else b).exp()  # later offsets are hidden; they must not overflow

    def _limited(self, b: Tensor) -> Tensor:
        return b if self.bias_limit is None else b.clamp(-self.bias_limit, self.bias_limit)

    def _check(self, x: Tensor, valid: Tensor | None, memory: NPRFMemory | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.out.in_features or not x.shape[1]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected (batch, length of at least 1, {self.out.in_features})."
            )
        if valid is not None and (valid.shape != x.shape[:2] or valid.dtype != torch.bool):
            raise ShapeError(
                f"valid has shape {tuple(valid.shape)} and dtype {valid.dtype}; expected {tuple(x.shape[:2])} bool."
            )
        if memory is not None and (not self.causal or valid is not None):
            raise UnsupportedError("a memory goes with causal=True and without padding; decode rows of equal length.")

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, num_features={self.num_features}, kernel={self.kernel!r}, normalised={self.normalised}, causal={self.causal}"
