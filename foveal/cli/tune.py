"""``foveal tune``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def fraction(text: str) -> float:
    """``"1%"`` or ``"0.01"`` as 0.01."""
    number = text.strip()
    try:
        return float(number[:-1]) / 100 if number.endswith("%") else float(number)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a share; write 1% or 0.01") from None


def tune(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, a .gguf file, or a Hugging Face id.")],
    context: Annotated[int, typer.Option(help="Tokens at which everything is measured.")] = 4096,
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to measure on; default: prose that Python carries.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, results.json and policy.json.")] = Path(
        "foveal-out"
    ),
    max_ppl_increase: Annotated[
        str, typer.Option(metavar="SHARE", help="Largest increase of perplexity that a policy may cost: 1% or 0.01.")
    ] = "1%",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    impl: Annotated[str, typer.Option(help="Attention implementation (see foveal info), or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Chooses text spans, needles and sampled rows.")] = 0,
    decode_tokens: Annotated[int, typer.Option(help="Tokens scored one by one through the cache.")] = 256,
    search: Annotated[bool, typer.Option(help="Also search a policy layer by layer.")] = True,
    method: Annotated[
        str, typer.Option(help="How the search finds a policy: greedy, hylra, flux, or all, side by side.")
    ] = "greedy",
    router: Annotated[
        Path | None, typer.Option(help="Routers from foveal train flux, for the methods flux and all.")
    ] = None,
    search_texts: Annotated[
        int, typer.Option(help="Pieces of the text that a searched policy must hold on, as far as the text reaches.")
    ] = 2,
    patterns: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Further patterns to measure, such as moba,xattention,triangle,dhsa_chunk."),
    ] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint run Python code of its own.")
    ] = False,
) -> None:
    """Find the attention that MODEL should use at this context length on this machine, and what it costs.

    An interrupted run goes on where it stopped when the same command is given again.
    """
    share = fraction(max_ppl_increase)
    from ..tune import TuneOptions, run_tune
    from ..tune.methods import methods_table
    from ..tune.table import table
    from .guard import note, output
    from .progress import bar

    options = TuneOptions(
        model=model,
        context=context,
        text=str(text) if text else None,
        out=str(out),
        max_ppl_increase=share,
        dtype=dtype,
        device=device,
        impl=impl,
        seed=seed,
        decode_tokens=decode_tokens,
        search=search,
        method=method,
        router=str(router) if router else "",
        search_texts=search_texts,
        trust_remote_code=trust_remote_code,
        patterns=tuple(name.strip() for name in patterns.split(",") if name.strip()),
    )
    with bar() as report:
        results = run_tune(options, report, note)
    output().print(table(results))
    beside = methods_table(results)
    if beside is not None:
        output().print(beside)
    for name in ("report.html", "results.json", "policy.json"):
        if (out / name).is_file():
            typer.echo(out / name)


def add_to(app: typer.Typer) -> None:
    app.command("tune")(tune)
