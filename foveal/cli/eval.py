"""``foveal eval``: long-context evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, a .gguf file, or a Hugging Face id.")],
    policy: Annotated[
        list[Path] | None,
        typer.Option(help="policy.json to measure beside the model's own attention; may be given several times."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of the longest contexts.")] = 4096,
    tasks: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Some of perplexity,kl,needle,multikey,tracking,copy; default: all."),
    ] = "",
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to use; default: prose that Python carries.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and results.json.")] = Path("foveal-eval"),
    trials: Annotated[int, typer.Option(help="Contexts of each setting.")] = 2,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Ask in the chat template; default: where there is one.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    impl: Annotated[str, typer.Option(help="Attention implementation (see foveal info), or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Chooses texts, facts and places.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint run Python code of its own.")
    ] = False,
) -> None:
    """Measure what MODEL still does at this context length: perplexity by position, retrieval, tracking, copying.

    Policies are measured on the same contexts as the model's own attention. An interrupted run goes on where it stopped when the
    same command is given again; tasks, trials and policies may be added.
    """
    from ..evals import EvalOptions, run_eval
    from ..evals.table import table
    from .guard import note, output
    from .progress import bar

    options = EvalOptions(
        model=model,
        policies=tuple(str(p) for p in policy or ()),
        context=context,
        tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()),
        text=str(text) if text else None,
        out=str(out),
        trials=trials,
        chat=chat,
        dtype=dtype,
        device=device,
        impl=impl,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    with bar() as report:
        results = run_eval(options, report, note)
    output().print(table(results))
    for name in ("report.html", "results.json"):
        typer.echo(out / name)


def add_to(app: typer.Typer) -> None:
    app.command("eval")(evaluate)
