"""``foveal inspect``: what a model's attention does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from ..lens import LayerProfile


def inspect(
    model: Annotated[str, typer.Argument(help="smollm2, a folder, a .gguf file, or a Hugging Face id.")],
    context: Annotated[int, typer.Option(min=2, help="Tokens of text to look at.")] = 2048,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text; default: prose that Python carries.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Look at this text instead, whole, and write a report.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write an HTML report: head atlas, sinks, rhythm of the text."),
    ] = None,
    probes: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Further probes for the report, such as received,norms.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="POLICY", help="policy.json: the report shows what it drops.")
    ] = None,
    circuits: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS", help="ioi, colored_objects, or both: the report shows which heads carry the answer."
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(min=1, help="Prompt pairs for every circuit; with --prompt, ioi looks at it alone.")
    ] = 16,
    arrays: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write every recorded array, as .safetensors.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(min=0, help="Show every head of this layer instead of all layers.")
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens that count as near, the query's own among them.")] = 128,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that count as sinks.")] = 4,
    rows: Annotated[int, typer.Option(min=1, help="Query rows sampled per head.")] = 256,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write every figure to a JSON file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw heat maps, as .png, .svg or .pdf.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    seed: Annotated[int, typer.Option(help="Chooses the text span, the sampled rows and the prompt pairs.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the checkpoint run Python code of its own.")
    ] = False,
) -> None:
    """Show what each layer and head of MODEL attends to: sinks, the local window, the rest, and how many keys matter."""
    from ..core.provenance import provenance
    from ..data import text as texts
    from ..hf.load import load_model
    from ..lens import plot as draw
    from ..lens import profile_model
    from . import inspect_report
    from .guard import note, output, write_json
    from .progress import bar

    plan = inspect_report.Plan.of(report, probes, compare, arrays, prompt, circuits)
    content = None if prompt is not None else texts.load_text(text)
    loaded = load_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=note)
    if prompt is not None:
        span = inspect_report.encode(loaded, prompt)
        context = span.shape[1]
    if loaded.context_limit is not None and context > loaded.context_limit:
        raise ConfigError(
            f"context is {context}, but {loaded.name} was made for at most {loaded.context_limit} tokens; "
            f"pass --context {loaded.context_limit} or less."
        )
    if content is not None:
        ids = texts.tokens(loaded.tokenizer, content)
        span = texts.split(ids, context, search=0, seed=seed, ahead=texts.prefix(loaded.tokenizer)).held_out
    patched = inspect_report.compare_pairs(plan, loaded, prompt, pairs, seed) if plan is not None else []
    with bar() as tell:
        profile = profile_model(
            loaded.model,
            span.to(loaded.model.device),
            rows=rows,
            window=window,
            sinks=sinks,
            seed=seed,
            progress=lambda done, total: tell("measuring attention", done, total),
        )
    if layer is None:
        output().print(profile.render())
    else:
        chosen = [p for p in profile.layers if p.layer_index == layer]
        if not chosen:
            raise ConfigError(f"layer is {layer}, but {loaded.name} has the layers 0 to {len(profile.layers) - 1}.")
        output().print(render_heads(chosen[0]))
    name = "the prompt" if prompt is not None else texts.text_name(text)
    facts = {"model": loaded.name, "fingerprint": loaded.fingerprint, "dtype": loaded.dtype, "text": name}
    if json is not None:
        write_json(json, {**facts, **profile.to_json(), "provenance": provenance()})
        typer.echo(json)
    if plot is not None:
        try:
            draw(profile).savefig(plot)
        except ValueError as error:
            raise ConfigError(f"--plot {plot}: {error}.") from None
        typer.echo(plot)
    if plan is not None:
        labels = [p.labels for p in profile.layers if p.role == "self"]
        found = inspect_report.write(plan, loaded, span, facts, labels, patched)
        if json is not None and found is not None:
            write_json(json, {**facts, **profile.to_json(), "circuits": found, "provenance": provenance()})


def render_heads(layer: LayerProfile) -> Table:
    """One row per head: where its mass goes, and how concentrated it is, with half of the 95 % interval where sampled."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
        title=f"Layer {layer.layer_index}, {layer.num_heads} heads on {layer.num_kv_heads} key heads, {layer.kv_len} tokens",
        caption=(
            f"sinks: first {layer.sinks} tokens; window: last {layer.window} tokens; keys 90 %: keys that hold 90 % of a row's "
            f"mass; share: of the keys it may see; {layer.rows.drawn} rows sampled, ± is half of the 95 % interval."
        ),
    )
    for name in ("head", "sinks", "window", "rest", "distance", "entropy", "keys 90 %", "share", "kind"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for h in range(layer.num_heads):

        def spread(name: str, spec: str, h: int = h) -> str:
            figure = getattr(layer, name)
            mean, half = float(figure.mean[h]), float(figure.high[h] - figure.low[h]) / 2
            return f"{mean:{spec}} ± {half:{spec}}" if half else f"{mean:{spec}}"

        table.add_row(
            str(h),
            f"{100 * float(layer.sink_mass[h] + layer.learned_sink_mass[h]):.1f} %",
            f"{100 * float(layer.window_mass[h]):.1f} %",
            f"{100 * float(layer.rest_mass[h]):.1f} %",
            spread("distance", ".0f"),
            spread("entropy", ".2f"),
            spread("keys90", ".0f"),
            f"{100 * float(layer.keys90_share.mean[h]):.1f} %",
            layer.labels[h],
        )
    return table


def add_to(app: typer.Typer) -> None:
    app.command("inspect")(inspect)
