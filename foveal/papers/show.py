"""What ``foveal papers`` prints: a list of cards, and one card in full."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from foveal.papers.cards import Card, ClaimState

STATE_STYLE = {
    ClaimState.REPRODUCED: "green",
    ClaimState.DIRECTION_HOLDS: "yellow",
    ClaimState.NOT_REPRODUCED: "red",
    ClaimState.NOT_YET_MEASURED: "dim",
    ClaimState.OUT_OF_REACH: "dim",
}
_STATUS_STYLE = {"implemented": "green", "partly": "yellow", "planned": "dim"}


def render_list(cards: Iterable[Card]) -> Table:
    """One row per card: slug, name, year, kind, status and how many claims have a verdict."""
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("slug", no_wrap=True)
    table.add_column("name")
    table.add_column("year", justify="right")
    table.add_column("kind")
    table.add_column("status")
    table.add_column("claims", justify="right")
    for card in cards:
        table.add_row(
            Text(card.slug, style="bold"),
            Text(card.name),
            Text(str(card.year)),
            Text(", ".join(card.kind)),
            Text(card.status, style=_STATUS_STYLE[card.status]),
            Text(card.progress),
        )
    return table


def render_card(card: Card) -> Group:
    """The whole card: citation, what it is, where it lives, claims with their states, errata."""
    present = set(card.rooms_present())
    parts: list[RenderableType] = [
        Text(f"{card.name} — {card.title}", style="bold"),
        Text(f"{', '.join(card.authors)} ({card.year}). {card.venue}"),
    ]
    links = [f"https://arxiv.org/abs/{card.arxiv}"] if card.arxiv else []
    links += [f"https://doi.org/{card.doi}"] if card.doi else []
    links += [f"authors' code: {card.code}"] if card.code else []
    parts += [Text("   ".join(links))] if links else []
    parts += [
        Text(),
        Text(f"{', '.join(card.kind)} · {card.domain}", style="italic"),
        Text(card.summary),
        Text.assemble(("Use when: ", "bold"), card.use_when),
        Text.assemble(("Avoid when: ", "bold"), card.avoid_when),
        Text(),
        Text.assemble(("Where: ", "bold"), (card.status, _STATUS_STYLE[card.status])),
    ]
    parts += [
        Padding(Text(room if room in present else f"{room}  (not yet there)"), (0, 0, 0, 2)) for room in card.rooms
    ]
    parts += [Text(), Text(f"Claims ({card.progress})", style="bold")]
    for claim in card.claims:
        state = claim.state
        texts = [
            Text.assemble((claim.id, "bold"), "  ", (str(state), STATE_STYLE[state])),
            Text(claim.statement),
            Text(f"{'' if claim.figure.startswith('criterion:') else 'paper: '}{claim.figure}  ({claim.source})"),
        ]
        if claim.here:
            texts.append(Text(f"here ({claim.scale}): {claim.here}" if not claim.needs else claim.here, style="dim"))
        if claim.needs:
            texts.append(Text(f"needs {claim.needs}", style="dim"))
        if claim.measured_by:
            texts.append(Text(f"measured by {claim.measured_by}", style="dim"))
        lines = Group(*texts)
        parts.append(Padding(lines, (0, 0, 1, 2)))
    if card.errata:
        parts.append(Text("Errata", style="bold"))
    for erratum in card.errata:
        lines = Group(
            Text.assemble((f"{erratum.where}: ", "bold"), erratum.what), Text(f"foveal: {erratum.foveal}", style="dim")
        )
        parts.append(Padding(lines, (0, 0, 1, 2)))
    return Group(*parts)
