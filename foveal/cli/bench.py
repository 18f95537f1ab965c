"""``foveal bench``: which implementation of attention is fastest for a mask, a length and a dtype."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ..bench.sweep import Sweep

OUT = Path("foveal-bench")


def bench(
    masks: Annotated[
        str, typer.Option(metavar="NAMES", help="Masks, such as causal,full_sliding:window=256; static, sparse or all.")
    ] = "static",
    lengths: Annotated[str, typer.Option(metavar="N,…", help="Tokens: 4096,8192 or 4k,8k.")] = "4k",
    heads: Annotated[int | None, typer.Option(help="Query heads; default 8 on CPU, 64 on CUDA.")] = None,
    kv_heads: Annotated[
        str | None,
        typer.Option(metavar="N,…", help="Key heads, one number for each head layout; default as query heads."),
    ] = None,
    head_dim: Annotated[int | None, typer.Option(help="Dimension of a head; default 64 on CPU, 128 on CUDA.")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAMES", help="float32, bfloat16, float16; default by device.")
    ] = None,
    impl: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Implementations; auto: what is quick to start here, all: also the rest."),
    ] = "auto",
    backward: Annotated[bool, typer.Option("--backward", help="Also time the backward pass.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    draws: Annotated[
        int, typer.Option(help="Masks drawn of each family that has chance in it; the paper takes 2 or 30.")
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of masks and tensors.")] = 42,
    repeats: Annotated[int | None, typer.Option(help="Turns at most; default 5 on CPU, 20 on CUDA.")] = None,
    seconds: Annotated[
        float, typer.Option(help="A case takes fewer turns, three at least, rather than longer.")
    ] = 20.0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.jsonl and report.html; default foveal-bench.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="All masks, small and both ways, in about a minute.")] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            metavar="P",
            help="Measure context parallelism over P local processes instead (under torchrun, over its own), with --quick, --impl, --seed and --out FILE alone.",
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(help="With --ranks: seconds after which a silent rank ends the run.")
    ] = 60.0,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Measure nothing; put two result files side by side."),
    ] = None,
) -> None:
    """Measure implementations of attention over masks, lengths, head layouts and dtypes: speed, memory, error.

    An interrupted run goes on where it stopped when the same command is given again. Exit code 1: a result was wrong.
    """
    if ranks is not None:
        from .bench_ranks import run_ranks

        run_ranks(ranks, quick=quick, impl=impl, timeout=timeout, seed=seed, out=out)
        return
    from ..bench import show, summary
    from ..bench.records import read
    from .guard import note, output, warn
    from .progress import bar

    if compare is not None:
        found = summary.compare(*(read(path) for path in compare))
        output().print(show.comparison_table(found))
        for name, a, b in found.differ:
            note(f"{name} differs: {a!r} and {b!r}")
        if found.missing:
            typer.echo(f"{len(found.missing)} cases are not in both:")
            for what, why in found.missing:
                typer.echo(f"  {what} ({why})")
        return
    from ..bench.report import write_report
    from ..bench.sweep import run_sweep
    from ..core.errors import UnsupportedError

    sweep = _sweep(
        masks, lengths, heads, kv_heads, head_dim, dtype, impl, backward, device, draws, seed, repeats, seconds, quick
    )
    folder = out or (OUT / "quick" if quick else OUT)
    with bar() as report:
        records, absent = run_sweep(sweep, folder, report)
    groups = summary.groups(records.rows)
    console = output()
    for table in show.tables(groups):
        console.print(table)
    for name, why in absent.items():
        note(f"{name}: {why}")
    for name, why, where in summary.refusals(groups):
        note(f"{name} has no rate for {', '.join(where)}: {why}")
    typer.echo(records.path)
    try:
        write_report(records.header, records.rows, folder / "report.html")
        typer.echo(folder / "report.html")
    except UnsupportedError as error:
        note(str(error))
    wrong = [row for row in records.rows if row["status"] == "wrong"]
    if wrong:
        warn(f"{len(wrong)} results are wrong: {', '.join(dict.fromkeys(row['impl'] for row in wrong))}.")
        raise typer.Exit(1)


QUICK = {"window": 64, "block": 128}
"""Options of masks in a quick run."""


def _sweep(
    masks: str, lengths: str, heads: int | None, kv_heads: str | None, head_dim: int | None, dtype: str | None, impl: str,
    backward: bool, device: str, draws: int, seed: int, repeats: int | None, seconds: float, quick: bool,
) -> Sweep:  # fmt: skip
    """The options as one object, with what is not given taken from the device."""
    import torch

    from ..bench.masks import parse_masks
    from ..bench.sweep import Sweep
    from ..bench.workload import BACKWARD, FORWARD, Heads
    from ..core.errors import ConfigError

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = device.startswith("cuda")
    if quick:
        masks, lengths, backward = "all" if masks == "static" else masks, "512" if lengths == "4k" else lengths, True
        heads, kv_heads, head_dim, repeats = heads or 4, kv_heads or "2", head_dim or (64 if cuda else 32), repeats or 3
    heads, dim = heads or (64 if cuda else 8), head_dim or (128 if cuda else 64)
    try:
        layouts = tuple(Heads(heads, int(n), dim) for n in _words(kv_heads or str(heads)))
    except ValueError:
        raise ConfigError(f"--kv-heads is {kv_heads!r}; expected whole numbers such as 8,2.") from None
    return Sweep(
        masks=tuple(parse_masks(masks, QUICK if quick else None)),
        lengths=tuple(_tokens(word) for word in _words(lengths)),
        heads=layouts,
        dtypes=tuple(_words(dtype or ("bfloat16" if cuda else "float32"))),
        directions=(FORWARD, BACKWARD) if backward else (FORWARD,),
        impls=tuple(_words(impl)),
        device=device,
        draws=draws,
        seed=seed,
        repeats=repeats or (20 if cuda else 5),
        seconds=seconds,
        warmup=3 if cuda else 0,
    )


def _words(text: str) -> list[str]:
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def _tokens(word: str) -> int:
    """``4096`` or ``4k`` (4 · 1024)."""
    from ..core.errors import ConfigError

    times = 1024 if word.lower().endswith("k") else 1
    try:
        return times * int(word[:-1] if times > 1 else word)
    except ValueError:
        raise ConfigError(f"--lengths holds {word!r}; expected tokens such as 4096 or 4k.") from None


def add_to(app: typer.Typer) -> None:
    app.command("bench")(bench)
