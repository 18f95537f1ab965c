"""How much a tiled kernel can gain from a neighborhood: key tiles visited, speed-up bound, wasted work.

The simulator that the GNA paper describes and does not release (NATTENSim, arXiv 2504.16922, appendix B.1). A kernel works
in tiles of queries and keys; a key tile is visited when one query of the query tile sees one key of it, and then all of its pairs
are computed. The bound on the speed-up over dense attention is the number of key tiles over the number that the *worst*
query tile visits. Nothing is run, and no pair of tokens is evaluated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.grid import Axis
from ..patterns.neighborhood import Neighborhood
from ..patterns.neighborhood_tiles import row_major_touches


@dataclass(frozen=True)
class Problem:
    """A neighborhood and the tiles of a kernel.

    Attributes:
        axes: the grid and its windows. q_tile, kv_tile: tokens of a tile per axis; with 1-D tiling their products count.
        kv_tiling: "static" key tiles lie on a fixed lattice; "dynamic" ones begin where the query tile's windows begin.
        tiling: "multi-dim", or "1-D": runs of consecutive row-major tokens.

    Raises:
        ConfigError: tiles that do not fit the grid's axes, or dynamic key tiles with 1-D tiling.
    """

    axes: tuple[Axis, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    kv_tiling: Literal["static", "dynamic"] = "static"
    tiling: Literal["multi-dim", "1-D"] = "multi-dim"

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        window: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        causal: bool | Sequence[bool] = False,
        *,
        q_tile: Sequence[int],
        kv_tile: Sequence[int],
        kv_tiling: Literal["static", "dynamic"] = "static",
        tiling: Literal["multi-dim", "1-D"] = "multi-dim",
    ) -> Problem:
        """From the words of ``Neighborhood``; raises what it raises."""
        each = [tuple(x) if isinstance(x, Sequence) else x for x in (window, stride, dilation, causal)]
        axes = Neighborhood(tuple(shape), *each).axes()  # type: ignore[arg-type]
        return cls(axes, tuple(q_tile), tuple(kv_tile), kv_tiling, tiling)

    def __post_init__(self) -> None:
        for name in ("q_tile", "kv_tile"):
            tile = getattr(self, name)
            if len(tile) != len(self.axes) or min(tile, default=0) < 1:
                raise ConfigError(
                    f"{name} is {tile!r}; expected {len(self.axes)} numbers of at least 1, one for each axis of the grid."
                )
        if self.tiling == "1-D" and self.kv_tiling == "dynamic":
            raise ConfigError("kv_tiling is 'dynamic' with tiling '1-D'; expected static key tiles there.")

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(axis.length for axis in self.axes)


@dataclass(frozen=True)
class Simulation:
    """What a tiled kernel does for a problem.

    Attributes:
        problem: what was simulated.
        kv_tiles: key tiles of dense attention. worst, mean: key tiles that a query tile visits at most, and on average.
        computed: pairs in all visited tiles. pairs: visible pairs. dense: all pairs.
        block_sparse: every real key of every visited tile is seen by every query of its query tile: no mask is needed.
        shortcut: the authors' sufficient condition for the same, without looking at tiles.
    """

    problem: Problem
    kv_tiles: int
    worst: int
    mean: float
    computed: int
    pairs: int
    dense: int
    block_sparse: bool
    shortcut: bool

    @property
    def bound(self) -> float:
        """Times faster than dense attention, at most."""
        return self.kv_tiles / self.worst

    @property
    def mean_bound(self) -> float:
        """The same with the average instead of the worst query tile; the paper uses the worst."""
        return self.kv_tiles / self.mean

    @property
    def flop_bound(self) -> float:
        """Dense pairs over visible pairs."""
        return self.dense / self.pairs

    @property
    def sparsity(self) -> float:
        return 1 - self.pairs / self.dense

    @property
    def wasted(self) -> float:
        """Share of the computed pairs that the mask hides."""
        return 1 - self.pairs / self.computed


def simulate(problem: Problem) -> Simulation:
    """Count the tiles that a kernel visits, by closed forms per axis (by runs of tokens with 1-D tiling)."""
    axes, how = problem.axes, problem.kv_tiling
    along = list(zip(axes, problem.q_tile, problem.kv_tile, strict=True))
    dense = math.prod(problem.grid) ** 2
    pairs = math.prod(int((high - low).sum()) for _, low, high in (axis.codes() for axis in axes))
    area = math.prod(problem.q_tile) * math.prod(problem.kv_tile)
    if problem.tiling == "1-D":
        counts = torch.cat(list(_run_visits(problem)))
        worst, mean, total = int(counts.max()), float(counts.double().mean()), int(counts.sum())
        kv_tiles = -(-math.prod(problem.grid) // math.prod(problem.kv_tile))
        return Simulation(problem, kv_tiles, worst, mean, total * area, pairs, dense, all(a.whole for a in axes), False)
    visits = [tile_visits(axis, q, k, how) for axis, q, k in along]
    kv_tiles = math.prod(-(-axis.length // k) for axis, _, k in along)
    total = math.prod(int(v.sum()) for v in visits)
    return Simulation(
        problem,
        kv_tiles,
        math.prod(int(v.max()) for v in visits),
        math.prod(float(v.double().mean()) for v in visits),
        total * area,
        pairs,
        dense,
        all(block_sparse(axis, q, k, how) for axis, q, k in along),
        all(block_sparse_shortcut(axis, q, k, how) for axis, q, k in along),
    )


def tile_visits(axis: Axis, q_tile: int, kv_tile: int, kv_tiling: str = "static") -> Tensor:
    """Key tiles that every query tile of every dilation group visits along one axis, int64."""
    found = []
    for g in range(axis.dilation):
        a, b, _, _ = axis.tile_spans(q_tile, g)
        if kv_tiling == "dynamic":
            found.append(_up(b - a, kv_tile))
        else:
            found.append(_up(b, kv_tile) - torch.div(a, kv_tile, rounding_mode="floor"))
    return torch.cat(found)


def _up(x: Tensor, unit: int) -> Tensor:
    return torch.div(x + unit - 1, unit, rounding_mode="floor")


def _run_visits(problem: Problem) -> Iterator[Tensor]:
    """Visited runs of every run of queries, dilation group by dilation group."""
    sizes = math.prod(problem.q_tile), math.prod(problem.kv_tile)
    for groups in itertools.product(*(range(axis.dilation) for axis in problem.axes)):
        axes = tuple(
            Axis(axis.group_length(g), axis.window, axis.stride, 1, axis.causal)
            for axis, g in zip(problem.axes, groups, strict=True)
        )
        yield row_major_touches(axes, *sizes, 0, math.prod(axis.length for axis in axes)).sum(-1)


def block_sparse(axis: Axis, q_tile: int, kv_tile: int, kv_tiling: str = "static") -> bool:
    """Whether every real key of every visited tile is seen by every query of its query tile, tile by tile."""
    for g in range(axis.dilation):
        a, b, all_a, all_b = axis.tile_spans(q_tile, g)
        length = axis.group_length(g)
        if kv_tiling == "static":
            a = torch.div(a, kv_tile, rounding_mode="floor") * kv_tile
            b = (_up(b, kv_tile) * kv_tile).clamp(max=length)
        else:
            b = (a + _up(b - a, kv_tile) * kv_tile).clamp(max=length)
        if not bool(((a >= all_a) & (b <= all_b)).all()):
            return False
    return True


def block_sparse_shortcut(axis: Axis, q_tile: int, kv_tile: int, kv_tiling: str = "static") -> bool:
    """The authors' sufficient condition for ``block_sparse``; it misses some block-sparse settings and never claims a false one.

    Causal axes never fulfil it. With dilation it is asked of every group.
    """
    if axis.causal:
        return False
    return all(_shortcut(axis, axis.group_length(g), q_tile, kv_tile, kv_tiling) for g in range(axis.dilation))


def _shortcut(axis: Axis, length: int, q_tile: int, kv_tile: int, kv_tiling: str) -> bool:
    w, s = axis.window, axis.stride
    if length == w:
        return True
    if s % q_tile or w % kv_tile:
        return False
    if kv_tiling == "dynamic":
        return True
    groups, left, centre = -(-length // s), w // 2, s // 2
    last = min(max(min(length // s * s + centre, length - 1) - left, 0), length - w)
    aligned_end = length % s == 0 or last % kv_tile == 0
    aligned_middle = (left - centre) % kv_tile == 0
    both_at_borders = groups == 2 and length % kv_tile == 0 and s + centre >= length - w
    return aligned_end and (aligned_middle or both_at_borders)


def end_to_end(bound: float, share: float, steps: float = 1.0) -> float:
    """Speed-up of a whole model whose self-attention gets ``bound`` times faster (Amdahl).

    Args:
        bound: of the attention. share: of self-attention in the run time. steps: share of denoising steps or layers that use it.

    Raises:
        ConfigError: a share outside 0 to 1, or a bound that is not positive.
    """
    for name, value in (("share", share), ("steps", steps)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value!r}; expected a number from 0 to 1.")
    if not bound > 0:
        raise ConfigError(f"bound is {bound!r}; expected a number above 0.")
    f = share * steps
    return 1 / ((1 - f) + f / bound)


def sweep(problem: Problem) -> list[Simulation]:
    """The strides worth knowing, from the smallest: none is at least another on every axis without a higher bound.

    Raises:
        ConfigError: 1-D tiling, for which axes do not decide alone.
    """
    if problem.tiling == "1-D":
        raise ConfigError("tiling is '1-D'; expected 'multi-dim' for a sweep over strides.")
    fronts = []
    for axis, q, k in zip(problem.axes, problem.q_tile, problem.kv_tile, strict=True):
        front, best = [], math.inf
        for stride in range(1, axis.window + 1):
            other = Axis(axis.length, axis.window, stride, axis.dilation, axis.causal)
            visits = int(tile_visits(other, q, k, problem.kv_tiling).max())
            if visits < best:
                front.append(other)
                best = visits
        fronts.append(front)
    found = [
        simulate(Problem(axes, problem.q_tile, problem.kv_tile, problem.kv_tiling))
        for axes in itertools.product(*fronts)
    ]
    return sorted(found, key=lambda s: (s.bound, [axis.stride for axis in s.problem.axes]))


@dataclass(frozen=True)
class UseCase:
    """A published setting: its grid, window and tiles, and the share of self-attention in the run time.

    ``inferred`` tiles are not stated by the paper; they were found because they reproduce its figures.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    share: float
    dense_steps: tuple[int, int]
    inferred: bool = False
    rows: dict[tuple[int, ...], float] = field(default_factory=dict)
    """Stride → the paper's simulated end-to-end speed-up."""

    def problem(self, stride: int | Sequence[int]) -> Problem:
        return Problem.of(self.grid, self.window, stride, q_tile=self.q_tile, kv_tile=self.kv_tile)


USE_CASES = {
    "hunyuan-91": UseCase(
        (30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8), 0.607, (15, 50),
        rows={(1, 1, 1): 1.73, (1, 8, 8): 2.17, (16, 8, 8): 2.23, (18, 24, 24): 2.06},
    ),
    "flux-4k": UseCase(
        (256, 256), (80, 80), (16, 16), (16, 8), 0.518, (9, 28), rows={(1, 1): 1.76, (16, 1): 1.84, (16, 16): 1.88}
    ),
    "cosmos-56": UseCase(
        (16, 44, 80), (16, 32, 48), (8, 4, 8), (4, 4, 8), 0.587, (12, 35), True,
        rows={(1, 1, 1): 1.35, (1, 8, 16): 1.50},
    ),
}  # fmt: skip
"""The paper's use cases (end-to-end result tables)."""
