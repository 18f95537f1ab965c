"""The picture of docs/neighborhood.md: what stride does to the keys of one query tile, and to the work of a tiled kernel.

Usage: python benchmarks/neighborhood_picture.py [--out docs/img/neighborhood.png]

Measures nothing: every number in it is counted by ``foveal.bench.gna_simulator``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from foveal.bench.gna_picture import COLOURS, LABELS, query_tile_map
from foveal.bench.gna_simulator import Problem, simulate

GRID, WINDOW, TILE = (64, 64), (16, 16), (8, 8)
PANELS = (("sliding", 1, TILE), ("strided", 8, TILE), ("strided, key tile 4×4", 8, (4, 4)), ("blocked", 16, TILE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "img" / "neighborhood.png")
    args = parser.parse_args()
    figure = Figure(figsize=(12, 3.7), layout="constrained")
    for i, (name, stride, kv_tile) in enumerate(PANELS):
        problem = Problem.of(GRID, WINDOW, stride, q_tile=TILE, kv_tile=kv_tile)
        found, view = simulate(problem), query_tile_map(problem, (3, 3))
        ax = figure.add_subplot(1, len(PANELS), i + 1)
        ax.imshow(view.keys.numpy(), cmap=ListedColormap(COLOURS), vmin=0, vmax=3)
        (top, bottom), (left, right) = view.query
        ax.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, lw=1.8, ec="black"))
        ax.set_xticks(range(0, 65, 16), labels=[])
        ax.set_yticks(range(0, 65, 16), labels=[])
        ax.set_title(f"{name}, stride {stride}", fontsize=10)
        ax.set_xlabel(f"bound {found.bound:.1f}× of {found.flop_bound:.0f}×, {found.wasted:.0%} wasted", fontsize=9)
    handles = [Patch(fc=c, ec="#999999", label=text) for c, text in zip(COLOURS, LABELS, strict=True)]
    handles.append(Patch(fill=False, ec="black", label="query tile 8×8"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
