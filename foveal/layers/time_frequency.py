"""MambAttention's hybrid block (arXiv 2507.00966): attention and bidirectional Mamba along time, then along frequency.

For ``(M, K, T, F)``: every frequency row attends over time and passes a Mamba in both directions, then every frame does so over
frequency. The attention of both axes is one module with one set of weights; that sharing is the paper's claim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, nearest
from ..kernels.dispatch import attention
from .mamba import BidirectionalMamba

Sharing = Literal["shared", "separate", "none"]
Order = Literal["attention first", "mamba first"]
Axes = Literal["both", "time", "frequency"]


class ResidualAttention(nn.Module):
    """``x + MHA(LN(x))`` for ``(M, N, dim)``: full attention, biases, no positions, no mask, no feed-forward part.

    Equal to ``nn.MultiheadAttention(dim, num_heads, batch_first=True)`` after a layer norm, with ``qkv`` as its ``in_proj``.

    Raises:
        ConfigError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(self, dim: int, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"{type(self).__name__}.num_heads is {num_heads}; expected a divisor of dim {dim}.")
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(attention(q, k, v).transpose(1, 2).flatten(2))


class SharedTimeFrequencyAttention(ResidualAttention):
    """The same residual attention along time and then along frequency, ``(M, dim, T, F)`` in and out.

    A drop-in for any network on spectrograms: it adds one attention's parameters for both axes.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Raises :class:`ShapeError` unless ``x`` is ``(M, dim, T, F)``."""
        check_map(x, self.out.in_features)
        for axis in (2, 3):
            x = along(super().forward, x, axis)
        return x


def along(layer: Callable[[Tensor], Tensor], x: Tensor, axis: int) -> Tensor:
    """Run a ``(batch, length, channels)`` layer along one axis (2: time, 3: frequency) of ``(M, K, T, F)``."""
    rows = x.movedim(1, -1) if axis == 3 else x.permute(0, 3, 2, 1)  # (M, other, along, K)
    out = layer(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
    return out.movedim(-1, 1) if axis == 3 else out.permute(0, 3, 2, 1)


def check_map(x: Tensor, channels: int) -> None:
    """Raise :class:`ShapeError` unless ``x`` is ``(M, channels, T, F)``."""
    if x.dim() != 4 or x.shape[1] != channels:
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, {channels}, frames, bins).")


class MambAttentionBlock(nn.Module):
    """Attention and a sequence core along time, then along frequency: ``a ← a + MHA(LN(a))``, ``a ← a + core(a)``.

    Args:
        dim: channels K. num_heads: of the attention.
        attention: ``"shared"`` one module for both axes (the paper), ``"separate"`` one for each, ``"none"`` (its Mamba baseline).
        order: which of the two comes first on each axis.
        axes: on which axes the block works.
        core: makes the sequence core ``(batch, length, dim) → same``; default :class:`BidirectionalMamba` with expand 4.

    Raises:
        ConfigError: an unknown option, or heads that do not divide ``dim``.
    """

    def __init__(
        self,
        dim: int = 64,
        num_heads: int = 8,
        *,
        attention: Sharing = "shared",
        order: Order = "attention first",
        axes: Axes = "both",
        core: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("attention", attention, ("shared", "separate", "none")),
            ("order", order, ("attention first", "mamba first")),
            ("axes", axes, ("both", "time", "frequency")),
        ):
            if value not in known:
                raise ConfigError(f"MambAttentionBlock.{name} is {value!r}. {nearest(str(value), known)}")
        self.dim, self.order = dim, order
        self.axes = {"both": (2, 3), "time": (2,), "frequency": (3,)}[axes]
        count = {"shared": 1, "separate": len(self.axes), "none": 0}[attention]
        self.attentions = nn.ModuleList(ResidualAttention(dim, num_heads) for _ in range(count))
        make = core if core is not None else (lambda width: BidirectionalMamba(width, expand=4))
        self.cores = nn.ModuleList(make(dim) for _ in self.axes)

    def forward(self, x: Tensor) -> Tensor:
        """``(M, dim, T, F)`` in and out.

        Raises:
            ShapeError: another shape.
        """
        check_map(x, self.dim)
        for index, axis in enumerate(self.axes):
            x = along(lambda rows, index=index: self._sequence(rows, index), x, axis)  # type: ignore[misc]
        return x

    def _sequence(self, rows: Tensor, index: int) -> Tensor:
        if self.order == "attention first":
            rows = self._attend(rows, index)
        rows = rows + self.cores[index](rows)
        return rows if self.order == "attention first" else self._attend(rows, index)

    def _attend(self, rows: Tensor, index: int) -> Tensor:
        if not self.attentions:
            return rows
        return self.attentions[index % len(self.attentions)](rows)
