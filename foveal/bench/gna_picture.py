"""Pictures of one query tile's work: which keys it sees, which key tiles a kernel visits for that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .gna_simulator import Problem, Simulation, simulate, tile_visits

FREE, VISITED, SOME, ALL = 0, 1, 2, 3
"""A key: not visited; in a visited tile but hidden from the whole query tile; seen by some of its queries; seen by all."""

COLOURS = ("#f4f4f4", "#f2b8a0", "#8fb8de", "#2f6db3")
LABELS = ("not visited", "visited for nothing", "seen by some queries", "seen by all queries")
"""Of the four levels, in pictures."""

_SIGNS = {FREE: "·", VISITED: "░", SOME: "▒", ALL: "█"}


@dataclass(frozen=True)
class Map:
    """The keys of dilation group 0 as one query tile meets them.

    Attributes:
        keys: int8 levels, one per key of the group. query: per axis ``[first, last + 1)`` of the query tile.
    """

    keys: Tensor
    query: tuple[tuple[int, int], ...]


def query_tile_map(problem: Problem, tile: tuple[int, ...] | None = None) -> Map:
    """What the query tile with these numbers meets; default the worst one, which decides the bound.

    Raises:
        ConfigError: no such tile, or 1-D tiling, whose tiles are no boxes.
    """
    if problem.tiling == "1-D":
        raise ConfigError("tiling is '1-D'; expected 'multi-dim' for a picture of tiles.")
    some = all_ = visited = torch.ones((), dtype=torch.bool)
    spans = []
    for a, (axis, q, k) in enumerate(zip(problem.axes, problem.q_tile, problem.kv_tile, strict=True)):
        length = axis.group_length(0)
        tiles = -(-length // q)
        at = int(tile_visits(axis, q, k, problem.kv_tiling)[:tiles].argmax()) if tile is None else tile[a]
        if not 0 <= at < tiles:
            raise ConfigError(f"tile is {tile!r}; expected a number from 0 to {tiles - 1} on axis {a}.")
        begin, end, all_begin, all_end = (int(x[at]) for x in axis.tile_spans(q, 0))
        first = begin // k * k if problem.kv_tiling == "static" else begin
        x = torch.arange(length)
        shape = [1] * len(problem.axes)
        shape[a] = -1
        some = some & ((x >= begin) & (x < end)).view(shape)
        all_ = all_ & ((x >= all_begin) & (x < all_end)).view(shape)
        visited = visited & ((x >= first) & (x < first + -(-(end - first) // k) * k)).view(shape)
        spans.append((at * q, min((at + 1) * q, length)))
    keys = visited.to(torch.int8) * VISITED
    keys[some] = SOME
    keys[all_] = ALL
    return Map(keys, tuple(spans))


def terminal(problem: Problem, tile: tuple[int, ...] | None = None, width: int = 100) -> str:
    """The map as text: one plane (the query tile's own, for three axes), thinned to fit ``width`` columns."""
    found = query_tile_map(problem, tile)
    keys, query = found.keys, found.query
    title = "keys of the query tile that visits most"
    if keys.dim() == 3:
        plane = query[0][0]
        title += f", plane {plane} of axis 0"
        keys, query = keys[plane], query[1:]
    if keys.dim() == 1:
        keys, query = keys[None], ((0, 1), *query)
    step = max(1, -(-keys.shape[1] // width))
    lines = []
    for y in range(0, keys.shape[0], step):
        row = []
        for x in range(0, keys.shape[1], step):
            inside = query[0][0] <= y < query[0][1] and query[1][0] <= x < query[1][1]
            row.append("Q" if inside else _SIGNS[int(keys[y, x])])
        lines.append("".join(row))
    legend = "Q queries  █ seen by all of them  ▒ by some  ░ visited for nothing  · not visited"
    return "\n".join([title + (f", every {step}th token" if step > 1 else ""), *lines, legend])


def draw(problem: Problem, path: Path | str, found: Simulation | None = None) -> None:
    """Write the map as PNG: all tokens for one or two axes, evenly spaced planes of axis 0 for three."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    found = found or simulate(problem)
    view = query_tile_map(problem)
    keys, query = view.keys, view.query
    if keys.dim() == 1:
        keys, query = keys[None], ((0, 1), *query)
    planes: list[tuple[int | None, Tensor]] = [(None, keys)]
    if keys.dim() == 3:
        touched = (keys > FREE).flatten(1).any(-1).nonzero()[:, 0].tolist()
        picked = sorted({touched[round(i * (len(touched) - 1) / 3)] for i in range(4)} | {query[0][0]})
        planes = [(int(i), keys[i]) for i in picked]
    figure = Figure(figsize=(3.2 * len(planes) + 1, 3.6), layout="constrained")
    for i, (plane, image) in enumerate(planes):
        ax = figure.add_subplot(1, len(planes), i + 1)
        ax.imshow(image.numpy(), cmap=ListedColormap(COLOURS), vmin=0, vmax=3, aspect="auto" if image.shape[0] == 1 else "equal")  # fmt: skip
        (top, bottom), (left, right) = query[-2:]
        if plane is None or query[0][0] <= plane < query[0][1]:
            ax.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, lw=1.8, ec="black"))
        ax.set_title("" if plane is None else f"plane {plane} of axis 0", fontsize=9)
        ax.tick_params(labelsize=7)
    handles = [Patch(fc=c, ec="#999999", label=text) for c, text in zip(COLOURS, LABELS, strict=True)]
    handles.append(Patch(fill=False, ec="black", label="query tile"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    axes = problem.axes
    figure.suptitle(
        f"grid {_times(problem.grid)}, window {_times(tuple(a.window for a in axes))}, stride {_times(tuple(a.stride for a in axes))}, "
        f"tiles {_times(problem.q_tile)} / {_times(problem.kv_tile)}: bound {found.bound:.2f}× of {found.flop_bound:.2f}×",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)


def _times(numbers: tuple[int, ...]) -> str:
    return "×".join(map(str, numbers))
