"""``foveal compress``: SHRP on an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .tune import fraction


def compress(
    model: Annotated[str, typer.Argument(help="minilm, a model folder, or a Hugging Face id; an encoder like BERT.")],
    target: Annotated[
        str, typer.Option(metavar="SHARE", help="Share of the layers' parameters to cut: 45% or 0.45.")
    ] = "45%",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 prose to train and evaluate on; default: prose that Python carries.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the pruned model and results.json.")] = Path(
        "foveal-compressed"
    ),
    steps: Annotated[int, typer.Option(help="Training steps with routing.")] = 400,
    post_steps: Annotated[int, typer.Option(help="Training steps after pruning.")] = 200,
    batch: Annotated[int, typer.Option(help="Sentences of a step.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of a sentence, at most.")] = 64,
    expander: Annotated[int, typer.Option(help="Hidden width of the shared network; 0 for a linear map.")] = 96,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
) -> None:
    """Keep one attention head per pruned layer of MODEL (SHRP), and measure what its sentence vectors are still worth.

    An interrupted training goes on where it stopped when the same command is given again.
    """
    share = fraction(target)
    from ..compress import CompressOptions, run_compress
    from ..compress.table import table
    from .guard import note, output
    from .progress import bar

    options = CompressOptions(
        model=model,
        target=share,
        text=str(text) if text else None,
        out=str(out),
        steps=steps,
        post_steps=post_steps,
        batch=batch,
        tokens=tokens,
        expander=expander,
        seed=seed,
    )
    with bar() as report:
        results = run_compress(options, report, note)
    output().print(table(results))
    for name in ("model.safetensors", "results.json"):
        typer.echo(out / name)


def add_to(app: typer.Typer) -> None:
    app.command("compress")(compress)
