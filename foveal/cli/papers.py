"""``foveal papers``: the catalogue of papers."""

from __future__ import annotations

from typing import Annotated

import typer


def papers(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUERY | show SLUG]", help="Words to search for, or one card to show."),
    ] = None,
) -> None:
    """List or search the papers, or show one: citation, where it lives, claims and their states, errata."""
    from ..papers import cards, load_card, render_card, render_list, search
    from .guard import complain, output

    words = words or []
    if words[:1] == ["show"]:
        if len(words) != 2:
            raise typer.BadParameter("show takes one slug, for example: foveal papers show dhsa")
        output().print(render_card(load_card(words[1])))
        return
    query = " ".join(words)
    found = search(query) if query else list(cards().values())
    if not found:
        complain(f"no paper matches {query!r}; `foveal papers` lists them all.", label="")
        raise typer.Exit(1)
    output().print(render_list(found))


def add_to(app: typer.Typer) -> None:
    app.command("papers")(papers)
