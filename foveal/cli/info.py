"""``foveal info``."""

from __future__ import annotations

from typing import Annotated

import typer


def info(json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False) -> None:
    """Show what is available here and what is not, and why: machine, packages, attention implementations, cache."""
    from ..core import info as facts
    from .guard import output

    found = facts.info()
    if json:
        import json as encoder

        typer.echo(encoder.dumps(found, indent=2))
        return
    output().print(facts.render(found))


def add_to(app: typer.Typer) -> None:
    app.command("info")(info)
