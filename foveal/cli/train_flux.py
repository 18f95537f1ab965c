"""``foveal train flux``: routers that choose between full and sparse attention for each prompt and layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def flux(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, a .gguf file, or a Hugging Face id.")],
    out: Annotated[Path, typer.Option(help="Folder for router.safetensors, policy.json and training.json.")] = Path(
        "foveal-flux"
    ),
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to train on; default: prose that Python carries.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per sample.")] = 1024,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 300,
    rows: Annotated[int, typer.Option(help="Samples per task and step.")] = 1,
    pool: Annotated[int, typer.Option(help="Tokens that a router reads at either end of the prompt.")] = 100,
    sparse: Annotated[
        str,
        typer.Option(
            metavar="NAME|JSON",
            help="What a sparse layer keeps: streaming, triangle, xattention, local, or a pattern as JSON; default: a window that fits --tokens.",
        ),
    ] = "",
    retrieval: Annotated[
        float, typer.Option(help="Target share of sparse layers where something must be found.")
    ] = 0.45,
    local: Annotated[float, typer.Option(help="Target share of sparse layers where nothing must.")] = 1.0,
    mode: Annotated[str, typer.Option(help="Gate in training: soft, or st (straight-through).")] = "soft",
    signed: Annotated[bool, typer.Option("--signed", help="Multipliers on the signed distance to the target.")] = False,
    lr: Annotated[float, typer.Option(help="Of the routers.")] = 5e-4,
    multiplier_lr: Annotated[float, typer.Option(help="Of the multipliers.")] = 1e-3,
    backbone_lr: Annotated[
        float, typer.Option(help="Above 0, train the model's q, k, v projections too and write it to OUT/model.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights, samples and noise.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint run Python code of its own.")
    ] = False,
) -> None:
    """Train Flux's layer routers on MODEL, which stays as it is, and write a policy for `foveal run` and `foveal tune --router`.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    from ..recipes.flux import FluxTraining
    from ..recipes.flux_run import FluxRun, run_flux, sparse_option
    from .guard import note
    from .progress import bar

    how = FluxTraining(
        steps=steps, rows=rows, chunk=1, pool=pool, sparse=sparse_option(sparse, tokens), mode=mode, signed=signed, lr=lr,  # type: ignore[arg-type]
        multiplier_lr=multiplier_lr, backbone_lr=backbone_lr, seed=seed,
    )  # fmt: skip
    options = FluxRun(
        model, str(text) if text else None, str(out), tokens, (retrieval, local), dtype=dtype, device=device,
        trust_remote_code=trust_remote_code, how=how,
    )  # fmt: skip
    with bar() as report:
        result = run_flux(options, report, note)
    for name, got in result["reached"].items():
        typer.echo(
            f"{name}: {got['sparse']:.2f} of the layers sparse (target {got['target']:.2f}), loss {got['loss']:.3f}"
        )
    for name in ("router.safetensors", "policy.json", "training.json"):
        typer.echo(out / name)


def add_to(app: typer.Typer) -> None:
    app.command("flux")(flux)
