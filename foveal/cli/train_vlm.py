"""``foveal train vlm``: the projector and adapters of the small vision-language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def vlm(
    out: Annotated[Path, typer.Option(help="File for the trained projector and adapters (safetensors).")] = Path("small_vlm.safetensors"),
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    batch: Annotated[int, typer.Option(help="Pictures per step.")] = 4,
    scenes: Annotated[int, typer.Option(help="Rendered scenes with exact answers.")] = 1500,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of scenes, order and weights.")] = 0,
    stamps: Annotated[
        Path | None, typer.Option(help="Folder of Debian's tuxpaint-stamps-default: captioned pictures, trained on as well.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="ADAPTER", help="Start from an adapter that this command wrote; its record is kept.")
    ] = None,
    score: Annotated[int, typer.Option(help="New scenes on which the trained model is scored; 0 for none.")] = 60,
    work: Annotated[
        Path | None, typer.Option(help="Folder for features and checkpoints; default in foveal's cache.")
    ] = None,
) -> None:  # fmt: skip
    """Train DINOv2-S → projector → SmolLM2 to answer questions about pictures.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    from ..core.cache import cache_dir
    from ..core.errors import ConfigError
    from ..core.provenance import provenance
    from ..core.weights import file_sha256
    from ..models.small_vlm import RANK, place_adapter, read_adapter, save_adapter, small_vlm
    from ..recipes.vlm import VLMOptions, score_vlm, train_vlm
    from .guard import note, output
    from .progress import bar

    before = None if init is None else read_adapter(init)
    options = VLMOptions(
        steps=steps, batch=batch, lr=lr, seed=seed, scenes=scenes, stamps=None if stamps is None else str(stamps),
        init=None if init is None else file_sha256(init),
    )  # fmt: skip
    if score < 0:
        raise ConfigError(f"score is {score}; expected 0 or more scenes.")
    if stamps is not None and not stamps.is_dir():
        raise ConfigError(
            f"stamps: {stamps} is no folder; expected usr/share/tuxpaint/stamps of Debian's tuxpaint-stamps-default."
        )
    own = f"{seed}-{steps}-{scenes}" + (f"-{options.init[:8]}" if options.init else "")
    folder = cache_dir() / "train-vlm" / own if work is None else work
    model, reader = small_vlm(seed=seed, progress=note)
    if before is not None and init is not None:
        place_adapter(model, before[0], init.name)
    with bar() as report:
        shown = lambda stage, done, of, loss: report(f"{stage}, loss {loss:.3f}" if loss else stage, done, of)  # noqa: E731
        record = train_vlm(model, reader, options, folder, progress=shown) | {"rank": RANK, "made": provenance()}
        if before is not None:
            record["earlier"] = before[1]
        save_adapter(model, out, record)
        if score:
            record["scored"] = score_vlm(model, reader, count=score, seed=seed, progress=shown)
            save_adapter(model, out, record)
    console = output()
    console.print(f"loss {record['first_loss']} → {record['last_loss']}", markup=False)
    for name, value in record.get("scored", {}).items():
        console.print(f"{name}: {value}", markup=False, soft_wrap=True)
    console.print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB)", markup=False, soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    app.command("vlm")(vlm)
