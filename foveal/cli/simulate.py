"""``foveal simulate``: what a method can gain, by counting and without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from rich.table import Table

    from ..bench.gna_simulator import Problem, Simulation

_PER_AXIS = ("--shape", "--window", "--stride", "--dilation", "--causal", "--q-tile", "--kv-tile")
_TILES = {1: (128,), 2: (16, 8), 3: (2, 8, 8)}
"""Default tiles of 128 tokens."""


class AxisCommand(TyperCommand):
    """A command whose per-axis options take as many numbers as there are axes: ``--shape 30 48 80``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        joined: list[str] = []
        for word in args:
            if len(joined) > 1 and joined[-2] in _PER_AXIS and not word.startswith("--"):
                joined[-1] += f" {word}"
            else:
                joined.append(word)
        return super().parse_args(ctx, joined)


def numbers(name: str, text: str) -> tuple[int, ...]:
    """``"30 48 80"``, ``"30,48,80"`` or ``"30x48x80"`` as numbers; raises a usage error naming the option."""
    words = text.replace(",", " ").replace("x", " ").replace("×", " ").split()
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise typer.BadParameter(
            f"{name} is {text!r}; expected whole numbers, one per axis, such as {name} 30 48 80"
        ) from None


def _axis(help: str) -> Any:
    return typer.Option(help=help, metavar="N …")


def gna(
    shape: Annotated[str | None, _axis("Tokens per axis.")] = None,
    window: Annotated[str | None, _axis("Keys per axis that a query sees.")] = None,
    stride: Annotated[str, _axis("Queries per axis that share a window.")] = "1",
    dilation: Annotated[str | None, _axis("Distance of keys per axis; default 1.")] = None,
    causal: Annotated[str | None, _axis("1 for a causal axis, 0 for another; default 0.")] = None,
    q_tile: Annotated[str | None, _axis("Query tile of the kernel; default 128 tokens.")] = None,
    kv_tile: Annotated[str | None, _axis("Key tile of the kernel; default the query tile.")] = None,
    kv_tiling: Annotated[
        str, typer.Option(help="static: key tiles on a lattice; dynamic: from the first key.")
    ] = "static",
    tiling: Annotated[str, typer.Option(help="multi-dim, or 1-D: runs of row-major tokens.")] = "multi-dim",
    share: Annotated[
        float | None, typer.Option(help="Share of self-attention in the run time, for the end-to-end bound.")
    ] = None,
    steps: Annotated[
        float | None, typer.Option(help="With --share: share of steps or layers that use the pattern; default 1.")
    ] = None,
    use_case: Annotated[str | None, typer.Option(help="A published setting: hunyuan-91, flux-4k, cosmos-56.")] = None,
    sweep_stride: Annotated[bool, typer.Option("--sweep-stride", help="All strides worth knowing.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Write the worst query tile's keys as .png.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Count the key tiles that a neighborhood-attention kernel visits: speed-up bound, wasted work, block sparsity."""
    import dataclasses

    from ..bench import gna_picture, gna_simulator
    from ..core.errors import ConfigError, nearest
    from .guard import check_png, note, output

    for name, part in (("--share", share), ("--steps", steps)):
        if part is not None and not 0 <= part <= 1:
            raise ConfigError(f"{name} is {part!r}; expected a number from 0 to 1.")
    if steps is not None and share is None and use_case is None:
        raise ConfigError(f"--steps is {steps!r} without --share; expected both, or --share alone.")
    steps = 1.0 if steps is None else steps
    check_png("--picture", picture)
    if use_case is not None:
        for name, given in (("--shape", shape), ("--window", window), ("--dilation", dilation), ("--causal", causal)):
            if given is not None:
                raise typer.BadParameter(
                    f"{name} is {given!r}, and --use-case brings its own; expected one or the other."
                )
        known = gna_simulator.USE_CASES
        if use_case not in known:
            raise ConfigError(f"--use-case is {use_case!r}. {nearest(use_case, known)}")
        case = known[use_case]
        problem = case.problem(numbers("--stride", stride) if stride != "1" else 1)
        share = case.share if share is None else share
        if case.inferred:
            note("the tiles of this use case are not published; they reproduce its figures.")
    else:
        if shape is None or window is None:
            raise typer.BadParameter(
                "expected --shape and --window, for example: foveal simulate gna --shape 64 64 --window 16 16"
            )
        grid = numbers("--shape", shape)
        if len(grid) not in _TILES:
            raise ConfigError(f"--shape is {grid!r}; expected one, two or three axes.")
        flags = _one_or_each("--causal", "0" if causal is None else causal)
        if not set(flags if isinstance(flags, tuple) else (flags,)) <= {0, 1}:
            raise ConfigError(f"--causal is {causal!r}; expected 0 or 1, for all axes or for each.")
        tiles = tuple(min(t, n) for t, n in zip(_TILES[len(grid)], grid, strict=True))
        problem = gna_simulator.Problem.of(
            grid,
            _one_or_each("--window", window),
            _one_or_each("--stride", stride),
            _one_or_each("--dilation", "1" if dilation is None else dilation),
            tuple(map(bool, flags)) if isinstance(flags, tuple) else bool(flags),
            q_tile=tiles,
            kv_tile=tiles,
        )
    if q_tile:
        queries = numbers("--q-tile", q_tile)
        problem = dataclasses.replace(problem, q_tile=queries, kv_tile=queries if use_case is None else problem.kv_tile)
    if kv_tile:
        problem = dataclasses.replace(problem, kv_tile=numbers("--kv-tile", kv_tile))
    for name, value, allowed in (("--kv-tiling", kv_tiling, ("static", "dynamic")), ("--tiling", tiling, ("multi-dim", "1-D"))):  # fmt: skip
        if value not in allowed:
            raise ConfigError(f"{name} is {value!r}; expected {' or '.join(map(repr, allowed))}.")
    if picture is not None and tiling == "1-D":
        raise ConfigError(f"--tiling is {tiling!r} with --picture; expected 'multi-dim', whose tiles are boxes.")
    problem = dataclasses.replace(problem, kv_tiling=kv_tiling, tiling=tiling)  # type: ignore[arg-type]
    found = gna_simulator.sweep(problem) if sweep_stride else [gna_simulator.simulate(problem)]
    if json:
        import json as encoder

        typer.echo(encoder.dumps([row(one, share, steps) for one in found], indent=2))
    else:
        console = output()
        console.print(headline(problem), highlight=False)
        console.print(render(found, share, steps))
        if not sweep_stride and problem.tiling != "1-D":
            console.print(gna_picture.terminal(problem), markup=False)
    if picture is not None:
        gna_picture.draw(found[-1].problem, picture, found[-1])
        note(f"wrote {picture}")


def _one_or_each(name: str, text: str) -> int | tuple[int, ...]:
    found = numbers(name, text)
    return found[0] if len(found) == 1 else found


def row(found: Simulation, share: float | None, steps: float) -> dict[str, Any]:
    """One simulation as JSON values."""
    from ..bench.gna_simulator import end_to_end

    axes = found.problem.axes
    out: dict[str, Any] = {
        "shape": [axis.length for axis in axes],
        **{name: [getattr(axis, name) for axis in axes] for name in ("window", "stride", "dilation", "causal")},
        "q_tile": list(found.problem.q_tile),
        "kv_tile": list(found.problem.kv_tile),
        "kv_tiling": found.problem.kv_tiling,
        "tiling": found.problem.tiling,
        "kv_tiles": found.kv_tiles,
        "visited_worst": found.worst,
        "visited_mean": found.mean,
        "bound": found.bound,
        "mean_bound": found.mean_bound,
        "flop_bound": found.flop_bound,
        "sparsity": found.sparsity,
        "wasted": found.wasted,
        "fully_block_sparse": found.block_sparse,
        "fully_block_sparse_shortcut": found.shortcut,
    }
    if share is not None:
        out["end_to_end"] = end_to_end(found.bound, share, steps)
        out["end_to_end_flop_bound"] = end_to_end(found.flop_bound, share, steps)
    return out


def headline(problem: Problem) -> str:
    times = "×".join
    shape, window, q, k = (
        times(map(str, x)) for x in (problem.grid, (a.window for a in problem.axes), problem.q_tile, problem.kv_tile)
    )
    return f"grid {shape}, window {window}, query tile {q}, key tile {k}, {problem.kv_tiling} key tiles, {problem.tiling} tiling"


def render(found: list[Simulation], share: float | None, steps: float) -> Table:
    """One row per stride."""
    from rich.table import Table

    from ..bench.gna_simulator import end_to_end

    table = Table(header_style="bold", pad_edge=False)
    heads = ["stride", "tiles visited", "of", "bound", "FLOP bound", "wasted", "block-sparse", "authors' shortcut"]
    for head in heads + (["end to end", "FLOP-wise"] if share is not None else []):
        table.add_column(head, justify="left" if head == "stride" else "right", no_wrap=True)
    for one in found:
        cells = [
            "×".join(str(axis.stride) for axis in one.problem.axes),
            f"{one.worst} (mean {one.mean:.1f})",
            str(one.kv_tiles),
            f"{one.bound:.2f}×",
            f"{one.flop_bound:.2f}×",
            f"{one.wasted:.1%}",
            "yes" if one.block_sparse else "no",
            "yes" if one.shortcut else "no",
        ]
        if share is not None:
            cells += [f"{end_to_end(bound, share, steps):.2f}×" for bound in (one.bound, one.flop_bound)]
        table.add_row(*cells)
    return table


def add_to(app: typer.Typer) -> None:
    from .simulate_kinetics import kinetics

    verbs = typer.Typer(no_args_is_help=True, help="What a method can gain, by counting and without running it.")
    verbs.callback()(lambda: None)
    verbs.command("gna", cls=AxisCommand)(gna)
    verbs.command("kinetics")(kinetics)
    app.add_typer(verbs, name="simulate")
