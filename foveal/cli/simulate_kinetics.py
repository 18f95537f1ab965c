"""``foveal simulate kinetics``: what decoding costs, what a cost limit buys, and where recorded trials say to spend it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ..policies.kinetics import Hardware, Method, ModelShape
    from ..policies.kinetics_allocation import Trace


def kinetics(
    model: Annotated[str, typer.Option(help="qwen3-0.6b … qwen3-32b, smollm2-135m, or a config.json.")] = "qwen3-8b",
    hardware: Annotated[
        str, typer.Option(help="b200 (FP8 peak, the paper's), b200-bf16, h200, h100, a100, or TFLOP/s:GB/s.")
    ] = "b200",
    prompt: Annotated[int, typer.Option("--in", help="Tokens of the prompt.")] = 256,
    output: Annotated[int, typer.Option("--out", help="Tokens generated per trial.")] = 16384,
    trials: Annotated[int, typer.Option("--trials", "-n", help="Answers per question.")] = 1,
    method: Annotated[str, typer.Option(help="all, dense, topk or block-topk.")] = "all",
    kv_bytes: Annotated[float, typer.Option(help="Bytes per element of the cache.")] = 2.0,
    combine: Annotated[str, typer.Option(help="sum: arithmetic, then memory (the paper); max: they overlap.")] = "sum",
    compute_only: Annotated[bool, typer.Option("--compute-only", help="The older law: memory is free.")] = False,
    parameters: Annotated[float | None, typer.Option(help="Active parameters, where a config does not tell.")] = None,
    limit: Annotated[
        float | None, typer.Option(help="TeFLOPs per question: tokens that they buy; with --traces, the best choice.")
    ] = None,
    traces: Annotated[
        Path | None,
        typer.Option(help="Recorded trials (JSON), with their own models, methods and lengths: accuracy against cost."),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the curves as .png.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Count what decoding costs: arithmetic plus memory traffic, dense and with a budget of keys."""
    from ..bench import kinetics_picture
    from ..core.errors import ConfigError, nearest
    from ..policies.kinetics import DENSE, block_methods, token_methods
    from ..policies.kinetics_allocation import read_traces
    from ..policies.kinetics_config import hardware_of, shape_of
    from .guard import check_png, note
    from .guard import output as console

    check_png("--picture", picture)
    kinds = {"dense": (), "topk": token_methods(), "block-topk": block_methods()}
    if method != "all" and method not in kinds:
        raise ConfigError(f"--method is {method!r}. {nearest(method, ['all', *kinds])}")
    if output < 1:
        raise ConfigError(f"--out is {output}; expected at least 1 token.")
    if limit is not None and not 0 < limit < float("inf"):
        raise ConfigError(f"--limit is {limit}; expected a positive number of TeFLOPs.")
    methods = [DENSE, *(m for name, found in kinds.items() if method in ("all", name) for m in found)]
    device = hardware_of(hardware)
    options: dict[str, Any] = {
        "intensity": 0.0 if compute_only else device.intensity,
        "kv_bytes": kv_bytes,
        "combine": combine,
    }
    if traces is not None:
        found = frontier(read_traces(traces), None if limit is None else limit * 1e12, options)
        if picture is not None:
            kinetics_picture.draw_frontiers(found["limits"], found["accuracy"], picture)
        tables = [frontier_table(found)]
    else:
        shape = shape_of(model, parameters)
        found = costs(shape, methods, device, prompt, output, trials, options, limit)
        if picture is not None:
            kinetics_picture.draw_costs(shape, methods, picture, prompt=prompt, output=output, trials=trials, **options)
        tables = [cost_table(found)] + ([limit_table(found)] if limit is not None else [])
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found, indent=2))
    else:
        out = console()
        out.print(found["headline"], highlight=False, markup=False)
        for table in tables:
            out.print(table)
    if picture is not None:
        note(f"wrote {picture}")


def costs(
    shape: ModelShape, methods: Sequence[Method], device: Hardware, prompt: int, output: int, trials: int,
    options: dict[str, Any], limit: float | None,
) -> dict[str, Any]:  # fmt: skip
    """Every method's terms in TeFLOPs, as JSON values; with ``limit`` (TeFLOPs) the tokens that it buys."""
    from ..policies.kinetics import crossover, decode_cost
    from ..policies.kinetics_allocation import TRIALS, affordable

    where = {"prompt": prompt, "trials": trials, **options}
    dense = decode_cost(shape, output=output, **where)
    rows = []
    for method in methods:
        cost = decode_cost(shape, method, output=output, **where)
        row: dict[str, Any] = {"method": str(method)}
        for name, value in (
            ("linear", cost.linear), ("attention", cost.attention), ("kv", cost.intensity * cost.kv),
            ("search", cost.search + cost.intensity * cost.search_reads), ("total", cost.total),
        ):  # fmt: skip
            row[f"{name}_teflops"] = value / 1e12
        row["seconds"] = cost.seconds(device)
        row["gain"] = dense.total / cost.total
        if limit is not None:
            row["tokens_within_limit"] = {
                str(n): affordable(shape, method, limit=limit * 1e12, **{**where, "trials": n})
                for n in sorted({*TRIALS, trials})
            }
        rows.append(row)
    turn = crossover(shape, intensity=options["intensity"], kv_bytes=options["kv_bytes"])
    finite = turn if turn < float("inf") else None
    when = "never" if finite is None else f"after {finite:,.0f} tokens"
    return {
        "headline": f"{shape.name} ({shape.parameters / 1e9:.3g}B active) on {device.name}, {options['intensity']:.4g} FLOP/byte: "
        f"prompt {prompt}, {output} tokens, {trials} trial{'s' if trials > 1 else ''}; without a prompt the cache outweighs the parameters {when}",
        "model": shape.name,
        "hardware": device.name,
        "intensity": options["intensity"],
        "kv_bytes": options["kv_bytes"],
        "combine": options["combine"],
        "prompt": prompt,
        "output": output,
        "trials": trials,
        "crossover_tokens": finite,
        "limit_teflops": limit,
        "methods": rows,
    }


def cost_table(found: dict[str, Any]) -> Table:
    """One row per method."""
    from rich.table import Table

    table = Table(header_style="bold", pad_edge=False, title="TeFLOPs", title_justify="left")
    heads = ["method", "linear", "attention", "cache", "search", "total", "seconds", "dense / this"]
    for head in heads:
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    for row in found["methods"]:
        terms = [f"{row[f'{name}_teflops']:.2f}" for name in ("linear", "attention", "kv", "search", "total")]
        table.add_row(row["method"], *terms, f"{row['seconds']:.4g}", f"{row['gain']:.2f}×")
    return table


def limit_table(found: dict[str, Any]) -> Table:
    """Tokens per trial that the limit buys: one row per method, one column per number of trials."""
    from rich.table import Table

    title = f"tokens per trial for {found['limit_teflops']:g} TeFLOPs"
    table = Table(header_style="bold", pad_edge=False, title=title, title_justify="left")
    counts = list(found["methods"][0]["tokens_within_limit"])
    for head in ["method", *(f"n={n}" for n in counts)]:
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    for row in found["methods"]:
        table.add_row(row["method"], *(f"{row['tokens_within_limit'][n]:,}" for n in counts))
    return table


def frontier(traces: list[Trace], limit: float | None, options: dict[str, Any]) -> dict[str, Any]:
    """Accuracy against cost, per model and for all, and the one best choice at every step or within ``limit`` eFLOPs."""
    from ..policies.kinetics_allocation import (
        CAPS,
        best_within,
        by_question,
        common_choices,
        envelope,
        log_spaced,
        oracle_accuracy,
    )  # fmt: skip

    every = by_question(traces, caps=(*CAPS, None), **options)
    priced = [c.cost for found in every.values() for c in found]
    limits = log_spaced(min(priced), max(priced)) if limit is None else [limit]
    curves = {"all": oracle_accuracy(every, limits)}
    dense = {q: [c for c in found if c.method.kind == "dense"] for q, found in every.items()}
    curves["dense"] = oracle_accuracy(dense, limits)
    for name in sorted({t.model.name for t in traces}):
        curves[name] = oracle_accuracy({q: [c for c in found if c.model == name] for q, found in every.items()}, limits)
    front = envelope(common_choices(every))
    if limit is not None:
        best = best_within(front, limit)
        front = [best] if best else []
    rows = [
        {
            "model": c.model, "method": str(c.method), "trials": c.trials, "cap": c.cap,
            "teflops": c.cost / 1e12, "accuracy": c.accuracy,
        }
        for c in front
    ]  # fmt: skip
    return {
        "headline": f"{len(every)} questions, {len(traces)} traces, {options['intensity']:.4g} FLOP/byte; one choice for all questions. "
        f"A choice per question, which needs the answers, reaches {curves['all'][-1]:.3f}.",
        "limits": limits,
        "accuracy": curves,
        "frontier": rows,
    }


def frontier_table(found: dict[str, Any]) -> Table:
    """One row per choice."""
    from rich.table import Table

    table = Table(header_style="bold", pad_edge=False)
    for head in ("model", "method", "trials", "tokens at most", "TeFLOPs", "accuracy"):
        table.add_column(head, justify="left" if head in ("model", "method") else "right", no_wrap=True)
    for c in found["frontier"]:
        cap = "no cap" if c["cap"] is None else str(c["cap"])
        table.add_row(c["model"], c["method"], str(c["trials"]), cap, f"{c['teflops']:.4g}", f"{c['accuracy']:.3f}")
    return table
