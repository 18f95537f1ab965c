"""ScatterFormer (arXiv 2401.00912): linear attention inside bird's-eye windows of sparse voxels, without padding.

A window holds the voxels of one scene with the same ``(y // S, x // S)``, all heights. Inside it every voxel sees every other by
ReLU linear attention, no scale, no position. Windows meet in the cross-window interaction: depthwise convolutions on four channel
groups, 3×3×3, S + 1 along x, S + 1 along y, and nothing, in the order of the authors' code (the paper lists the long ones first).

The block, with BN over voxels: ``X ← X + SLA(BN(X)); X ← BN(X); X ← X + CWI(X); X ← X + FFN(BN(X))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError
from ..kernels.linear_ragged import check_cu, linear_attention_packed
from ..kernels.sparse_conv import Neighbors, box, check_coords, depthwise

Init = Literal["scaled", "paper"]
EPS = 1e-6


@dataclass(frozen=True, eq=False)
class Windows:
    """Which voxels share a window.

    Attributes:
        cu_seqlens: ``(W + 1,)`` int64 boundaries of the windows in sorted order.
        order: ``(V,)`` int64, the voxel at each sorted place; None when voxels lie sorted already.
    """

    cu_seqlens: Tensor
    order: Tensor | None = None

    @classmethod
    def from_ids(cls, ids: Tensor) -> Windows:
        """Windows of equal ``ids`` ``(V,)`` integers; voxels of a window keep their order."""
        if ids.dim() != 1 or ids.is_floating_point():
            raise ShapeError(f"ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; expected (voxels,) integers.")
        ordered, order = ids.sort(stable=True)
        _, counts = torch.unique_consecutive(ordered, return_counts=True)
        return cls(nn.functional.pad(counts.cumsum(0), (1, 0)), order)

    @classmethod
    def from_coords(cls, coords: Tensor, size: int) -> Windows:
        """Windows of ``size`` × ``size`` places of ``coords`` ``(V, 4)``, integers (batch, z, y, x).

        Raises:
            ShapeError: coordinates of another shape or dtype. ConfigError: a size below 1.
        """
        check_coords(coords)
        if size < 1:
            raise ConfigError(f"the window size is {size}; expected at least 1.")
        if not len(coords):
            return cls(coords.new_zeros(1, dtype=torch.int64), coords.new_zeros(0, dtype=torch.int64))
        cell = torch.div(coords[:, 2:].long(), size, rounding_mode="floor")
        cell = cell - cell.amin(0)
        rows, columns = (cell.amax(0) + 1).tolist()
        return cls.from_ids((coords[:, 0].long() * rows + cell[:, 0]) * columns + cell[:, 1])

    def sorted(self, x: Tensor) -> Tensor:
        """Rows ``(V, …)`` in window order."""
        return x if self.order is None else x[self.order]

    def restored(self, x: Tensor) -> Tensor:
        """Rows in window order back at their voxels."""
        return x if self.order is None else torch.empty_like(x).index_copy(0, self.order, x)


class ScatteredLinearAttention(nn.Module):
    """ReLU linear attention inside windows, ``(V, dim)`` in and out.

    Args:
        dim: width. num_heads: a divisor of it. chunk: rows per chunk; default fits the mean window.
    """

    def __init__(self, dim: int, num_heads: int = 4, *, chunk: int | None = None) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"ScatteredLinearAttention.num_heads is {num_heads}; expected a divisor of dim {dim}.")
        self.num_heads, self.chunk = num_heads, chunk
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor, windows: Windows | Tensor) -> Tensor:
        """``windows``: from :class:`Windows`, or window ids ``(V,)`` of any integers.

        Raises:
            ShapeError: x of another shape, or windows of other voxels.
        """
        if x.dim() != 2 or x.shape[1] != self.out.in_features:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (voxels, {self.out.in_features}).")
        if isinstance(windows, Tensor):
            windows = Windows.from_ids(windows)
        check_cu(windows.cu_seqlens, len(x))
        q, k, v = self.qkv(windows.sorted(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        out, _ = linear_attention_packed(torch.relu(q), torch.relu(k), v, windows.cu_seqlens, eps=EPS, chunk=self.chunk)
        return self.out(windows.restored(out.flatten(1)))


class CrossWindowInteraction(nn.Module):
    """Depthwise convolutions one voxel longer than a window, on channel groups of ``dim / 4``; no residual, no bias.

    Args:
        dim: width, divisible by 4. window: S, even, so that S + 1 has a centre.
        init: ``"scaled"``: N(0, 1/taps); ``"paper"``: N(0, 1), as the authors' code, which is large for 27 taps.
    """

    def __init__(self, dim: int, window: int, *, init: Init = "scaled") -> None:
        super().__init__()
        if dim % 4 or window < 2 or window % 2 or init not in ("scaled", "paper"):
            raise ConfigError(
                f"CrossWindowInteraction has dim={dim}, window={window}, init={init!r}; expected dim divisible by 4, an even window (a kernel of window + 1 is centred only then), and 'scaled' or 'paper'."
            )
        self.window, self.group = window, dim // 4
        self.kernels = (box((3, 3, 3)), box((1, 1, window + 1)), box((1, window + 1, 1)))
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(len(taps), self.group) * (len(taps) ** -0.5 if init == "scaled" else 1.0))
            for taps in self.kernels
        )

    def neighbors(self, coords: Tensor) -> list[Neighbors]:
        """What :meth:`forward` needs of voxels ``coords`` ``(V, 4)``; layers with the same window share it."""
        return [Neighbors.find(coords, taps) for taps in self.kernels]

    def forward(self, x: Tensor, neighbors: list[Neighbors]) -> Tensor:
        """``(V, dim)`` in and out."""
        *parts, rest = x.split(self.group, 1)
        outs = [depthwise(p, w, n) for p, w, n in zip(parts, self.weights, neighbors, strict=True)]
        return torch.cat([*outs, rest.to(outs[0].dtype)], 1)


class ScatterBlock(nn.Module):
    """One block of the backbone; see the module for its order.

    Args:
        dim, num_heads, window, init: of its parts. ratio: inner width of the FFN over ``dim``.
        attention, interaction: False leaves a part out, for ablations.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, window: int = 12, *, ratio: int = 2, init: Init = "scaled", attention: bool = True,
        interaction: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm1d(dim, eps=1e-3, momentum=0.01) for _ in range(3))
        self.attention = ScatteredLinearAttention(dim, num_heads) if attention else None
        self.interaction = CrossWindowInteraction(dim, window, init=init) if interaction else None
        self.ffn = nn.Sequential(nn.Linear(dim, ratio * dim), nn.ReLU(), nn.Linear(ratio * dim, dim))

    def forward(self, x: Tensor, windows: Windows, neighbors: list[Neighbors]) -> Tensor:
        """``(V, dim)`` in and out; the rest belongs to the voxels and is shared by blocks."""
        if self.attention is not None:
            x = x + self.attention(self.norm1(x), windows)
        x = self.norm2(x)
        if self.interaction is not None:
            x = x + self.interaction(x, neighbors)
        return x + self.ffn(self.norm3(x))


class ScatterStage(nn.Module):
    """``depth`` blocks on the same voxels; sorts by window and finds neighbours once.

    Args:
        dim, num_heads, window, depth: sizes. options: of :class:`ScatterBlock`.
    """

    def __init__(
        self, dim: int, num_heads: int = 4, window: int = 12, depth: int = 3, **options: bool | int | str
    ) -> None:
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(ScatterBlock(dim, num_heads, window, **options) for _ in range(depth))  # type: ignore[arg-type]

    def forward(self, x: Tensor, coords: Tensor) -> Tensor:
        """``x`` ``(V, dim)`` at ``coords`` ``(V, 4)``, integers (batch, z, y, x), in any order; the same order comes back.

        Raises:
            ShapeError: coordinates that do not fit x, or two voxels at one place.
        """
        if len(coords) != len(x):
            raise ShapeError(f"coords has {len(coords)} voxels and x has {len(x)}; expected the same number.")
        given = Windows.from_coords(coords, self.window)
        x, coords = given.sorted(x), given.sorted(coords)
        inside = Windows(given.cu_seqlens)
        first = next((m for m in self.modules() if isinstance(m, CrossWindowInteraction)), None)
        neighbors = [] if first is None else first.neighbors(coords)
        for block in self.blocks:
            x = block(x, inside, neighbors)
        return given.restored(x)
