"""``foveal patterns``: who may attend to whom, and how to write it in a policy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from ..patterns import Pattern

_EXAMPLES = {
    "int": 1024,
    "Budget": {"density": 0.125},
    "tuple[int, ...] | None": [64, 64],
    "int | tuple[int, ...]": 16,
    "router": "out/router.safetensors",
    "router_sha256": "…",
}
"""Values for required fields, by name or declared type."""


def patterns(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[show NAME]", help="One pattern to show in full; without it, all.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Draw it with this field, as JSON: window=64, budget.density=0.1."
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Draw what it keeps of so many tokens.")] = None,
    grid: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Token grid, such as 16x16 or 8x16x16; its size is the number of tokens."),
    ] = None,
    query: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Also draw one query's keys on the grid: 8,8; default its middle."),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Heads to draw.")] = 1,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="No causal mask.")] = False,
    seed: Annotated[int, typer.Option(help="Of the example queries and keys.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the picture to this .png or .html.")] = None,
) -> None:
    """List the attention patterns, or show one: its fields, how to write it in policy.json, and a picture of what it keeps.

    A picture is drawn when --tokens or --grid is given. Patterns that read content are shown on example queries and keys.
    """
    from ..core.registry import lookup
    from ..patterns import names, operators
    from .guard import output

    words = words or []
    if not words and not (settings or tokens or grid or out):
        output().print(render_names(names()))
        output().print(render_names(operators(), "operators, which run patterns"))
        return
    if len(words) != 2 or words[0] != "show":
        raise typer.BadParameter(
            "expected nothing, or show and one name, for example: foveal patterns show sliding_window --tokens 64"
        )
    if words[1] in operators():
        raise typer.BadParameter(
            f"{words[1]!r} is an operator, which runs patterns and keeps nothing of its own; expected a pattern, such as sliding_window."
        )
    cls = lookup("pattern", words[1])
    if not (settings or tokens or grid or out):
        output().print(render_pattern(cls))
        return
    _draw(cls, settings or [], tokens, grid, query, heads, not bidirectional, seed, out)


def _draw(
    cls: type[Pattern],
    settings: list[str],
    tokens: int | None,
    grid: str | None,
    query: str | None,
    heads: int,
    causal: bool,
    seed: int,
    out: Path | None,
) -> None:
    from ..patterns.picture import cells, draw
    from .draw import DENSE_VIEW, FIGURE_CELLS, HIGH, WIDE, read_settings, terminal, write
    from .guard import output

    shape = None if grid is None else _numbers("--grid", grid, "x", "16x16")
    if shape is None:
        count = DENSE_VIEW if tokens is None else tokens
    else:
        count = math.prod(shape) if tokens is None else tokens
        if count < math.prod(shape):
            raise typer.BadParameter(
                f"--tokens is {count} and --grid {grid} has {math.prod(shape)}; expected at least as many tokens."
            )
    pattern = cls.from_json({**drawn(cls, count, shape), **read_settings(settings)}, "--set")
    place = _place(shape, query)
    dense = count <= DENSE_VIEW
    rows, columns = (
        (cells(count, FIGURE_CELLS),) * 2 if out is not None else (count if dense else HIGH, count if dense else WIDE)
    )
    got = draw(
        pattern, count, rows=rows, columns=columns, causal=causal, heads=heads, grid=shape, query=place, seed=seed
    )
    if out is None:
        output().print(terminal(pattern, got, count, shape))
    else:
        write(out, pattern, got, count, shape)
        typer.echo(out)


def _numbers(option: str, text: str, sign: str, example: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.lower().split(sign))
    except ValueError:
        found = ()
    if not found or min(found) < (1 if sign == "x" else 0):
        raise typer.BadParameter(f"{option} is {text!r}; expected whole numbers such as {example}.")
    return found


def _place(shape: tuple[int, ...] | None, query: str | None) -> int | None:
    """Row of the chosen query on the grid."""
    if shape is None:
        if query is not None:
            raise typer.BadParameter("--query needs a --grid on which the keys can be drawn.")
        return None
    at = tuple(n // 2 for n in shape) if query is None else _numbers("--query", query, ",", "8,8")
    if len(at) != len(shape) or any(x >= n for x, n in zip(at, shape, strict=True)):
        raise typer.BadParameter(
            f"--query is {query!r}; expected {len(shape)} numbers inside {'×'.join(map(str, shape))}."
        )
    row = 0
    for x, n in zip(at, shape, strict=True):
        row = row * n + x
    return row


def render_names(known: dict[str, type[Any]], title: str | None = None) -> Table:
    """One row per pattern or operator: its name, class, and first sentence."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold", pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("class", no_wrap=True)
    table.add_column("what a query sees" if title is None else "what it does")
    for name, cls in known.items():
        table.add_row(Text(name, style="bold"), cls.__name__, Text(_plain(inspect.getdoc(cls) or "").split("\n\n")[0]))
    return table


def render_pattern(cls: type[Pattern]) -> Group:
    """Everything about one pattern that its docstring and its fields say."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    summary, helps, rest = read_docstring(inspect.getdoc(cls) or "")
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    table.add_column("field", no_wrap=True)
    table.add_column("meaning")
    for f in dataclasses.fields(cls):
        name = Text.assemble((f.name, "bold"), (f"\n{_default(f)}", "dim"))
        table.add_row(name, Text.assemble(helps.get(f.name, ""), (f"\n{_type(f)}", "dim")))
    parts: list[Any] = [
        Text.assemble((cls.registered_name, "bold"), f"  (foveal.patterns.{cls.__name__})"),
        Text(),
        Text(summary),
        Text(),
    ]
    parts += [table, Text()] if dataclasses.fields(cls) else []
    parts += [Text(rest), Text()] if rest else []
    sample = example(cls)
    policy = {"foveal_policy": 1, "default": {"prefill": sample}}
    arguments = ", ".join(f"{k}={_python(v)}" for k, v in sample.items() if k != "pattern")
    parts += [
        Text("In policy.json, in every layer:", style="bold"),
        Text(f"  {json.dumps(policy)}", no_wrap=True, overflow="ignore"),
        Text("In Python:", style="bold"),
        Text(f"  foveal.patterns.{cls.__name__}({arguments})"),
    ]
    return Group(*parts)


def example(cls: type[Pattern]) -> dict[str, Any]:
    """The shortest JSON of this pattern: its name and its required fields, with ordinary values."""
    return _filled(cls, _EXAMPLES)


def drawn(cls: type[Pattern], tokens: int, grid: tuple[int, ...] | None) -> dict[str, Any]:
    """The same with values that leave something out of so many tokens; a pattern that asks for a grid takes the one that is drawn,
    or the squarest one of the tokens."""
    high = max(n for n in range(1, math.isqrt(tokens) + 1) if tokens % n == 0)
    shape = grid or (high, tokens // high)
    near = max(1, (min(grid) if grid else tokens) // 4)
    values = {"int": near, "tuple[int, ...] | None": list(shape), "int | tuple[int, ...]": max(1, min(shape) // 2)}
    return _filled(cls, {**_EXAMPLES, **values})


def _filled(cls: type[Pattern], values: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {"pattern": cls.registered_name}
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            out[f.name] = values[f.name] if f.name in values else values[_type(f)]
    return out


def read_docstring(text: str) -> tuple[str, dict[str, str], str]:
    """``(what stands before "Attributes:", the fields' descriptions, what stands after them)``."""
    before, _, after = text.partition("\nAttributes:\n")
    helps: dict[str, str] = {}
    rest: list[str] = []
    name = ""
    for line in after.splitlines():
        start = re.match(r"    (\w[\w, ]*): (.*)", line)
        if rest or (line and not line.startswith("    ")):
            rest.append(line)
        elif start:
            name = start[1]
            helps[name] = start[2]
        elif line.strip() and name:
            helps[name] += f" {line.strip()}"
    spread = {one.strip(): _plain(text) for names, text in helps.items() for one in names.split(",")}
    return _plain(before.strip()), spread, _plain("\n".join(rest).strip())


def _plain(text: str) -> str:
    """A docstring's text without its markup; single line breaks become spaces."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _type(f: dataclasses.Field[Any]) -> str:
    name = f.type if isinstance(f.type, str) else f.type.__name__
    return re.sub(r"Literal\[(.*)\]", r"one of \1", name)


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        return f"= {f.default!r}" if isinstance(f.default, str) else f"= {f.default}"
    return f"= {f.default_factory()}" if f.default_factory is not dataclasses.MISSING else "required"


def _python(value: Any) -> str:
    if isinstance(value, dict):
        return f"foveal.core.budget.Budget({', '.join(f'{k}={v!r}' for k, v in value.items())})"
    return repr(value)


def add_to(app: typer.Typer) -> None:
    app.command("patterns")(patterns)
