"""``foveal patterns``: who may attend to whom, and how to write it in a policy."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
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
}
"""Values for required fields, by declared type."""


def patterns(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[show NAME]", help="One pattern to show in full; without it, all.")
    ] = None,
) -> None:
    """List the attention patterns, or show one: its fields, their defaults, and how to write it in policy.json."""
    from ..core.registry import lookup
    from ..patterns import names
    from .guard import output

    words = words or []
    if not words:
        output().print(render_names(names()))
    elif words[0] == "show" and len(words) == 2:
        output().print(render_pattern(lookup("pattern", words[1])))
    else:
        raise typer.BadParameter(
            "expected nothing, or show and one name, for example: foveal patterns show sliding_window"
        )


def render_names(known: dict[str, type[Pattern]]) -> Table:
    """One row per pattern: its name, class, and first sentence."""
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("class", no_wrap=True)
    table.add_column("what a query sees")
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
    out: dict[str, Any] = {"pattern": cls.registered_name}
    for f in dataclasses.fields(cls):
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            out[f.name] = _EXAMPLES[_type(f)]
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
