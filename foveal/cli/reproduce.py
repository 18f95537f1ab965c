"""``foveal reproduce``: measure a paper's claims on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from ..papers.reproduce import Outcome


def reproduce(
    slug: Annotated[str, typer.Argument(metavar="SLUG", help="The paper's card, as in `foveal papers`.")],
    claim: Annotated[str | None, typer.Option(help="One claim; default all that this machine can measure.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of result files.")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="Show the committed results; measure nothing.")] = False,
) -> None:
    """Measure a paper's claims on this machine: the paper's figure, ours, the criterion, the verdict."""
    from ..papers import reproduce as engine
    from .guard import note, output

    console = output()
    card, claims = engine.claims_of(slug, claim)
    console.print(f"{card.name} — {card.title}", style="bold", markup=False)
    if stored:
        for one in claims:
            console.print(render(engine.stored(one)))
        return
    folder = out or engine.default_out()
    for one in claims:
        if not engine.obstacle(one):
            note(f"{one.id} …")
        outcome = engine.measured(one, out=folder, go_on=claim is None)
        console.print(render(outcome))
        if outcome.result is not None:
            note(f"wrote {(folder or engine.CHECKOUT_RESULTS) / slug / (one.id + '.json')}")


def render(outcome: Outcome) -> Group:
    """One claim: what the paper says, what we found, when it counts, the verdict."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    from ..papers.cards import ClaimState
    from ..papers.show import STATE_STYLE

    claim = outcome.claim
    label = "" if claim.figure.startswith("criterion:") else "paper:     "
    lines = [Text.assemble((claim.id, "bold"), "  ", claim.statement), Text(f"{label}{claim.figure}  ({claim.source})")]
    if outcome.result is None:
        lines.append(Text(f"not measured: {outcome.why_not}", style="dim"))
    else:
        lines += [
            Text(f"ours:      {outcome.ours}"),
            Text(f"criterion: {claim.here}", style="dim"),
            Text.assemble("verdict:   ", (outcome.verdict, STATE_STYLE[ClaimState(outcome.verdict)])),
        ]
    return Group(*(Padding(line, (0, 0, 0, 0 if i == 0 else 2)) for i, line in enumerate(lines)), Text())


def add_to(app: typer.Typer) -> None:
    app.command("reproduce")(reproduce)
