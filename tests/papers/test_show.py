"""What the command prints about papers."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType

from foveal.papers import cards, load_card, render_card, render_list, search
from foveal.papers.cards import parse_card


def printed(renderable: RenderableType, width: int = 400) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_list_has_a_row_for_every_card() -> None:
    table = render_list(cards().values())
    assert table.row_count == len(cards())
    text = printed(table)
    for card in cards().values():
        row = next(line for line in text.splitlines() if f" {card.slug} " in line.replace("│", " "))
        assert card.name in row and str(card.year) in row and card.status in row and card.progress in row


def test_list_of_a_search() -> None:
    assert render_list(search("eeg channel")).row_count < len(cards())
    assert render_list([]).row_count == 0


@pytest.mark.parametrize("slug", list(cards()))
def test_card_shows_everything(slug: str) -> None:
    card = load_card(slug)
    text = printed(render_card(card), width=4000)
    for part in (card.title, card.venue, card.domain, card.use_when, card.avoid_when, *card.authors, *card.rooms):
        assert part in text
    for claim in card.claims:
        assert claim.id in text and claim.figure in text and claim.here in text and claim.needs in text
        assert str(claim.state) in text
    for erratum in card.errata:
        assert erratum.what in text and erratum.foveal in text


def test_missing_rooms_are_marked() -> None:
    card = load_card("eca")
    changed = type(card)(**{**card.__dict__, "rooms": ("foveal/papers/", "foveal/nowhere.py")})
    text = printed(render_card(changed))
    assert "foveal/nowhere.py  (not yet there)" in text
    assert "foveal/papers/  (not" not in text
    assert "Where: partly" in text


def test_brackets_are_not_markup() -> None:
    text = (
        'schema = 1\nslug = "toy"\nname = "[red]Toy[/red]"\ntitle = "T"\nauthors = ["A"]\nyear = 2024\nvenue = "v"\n'
        'kind = ["probe"]\ndomain = "d"\nsummary = "[IND] marks"\nuse_when = "u"\navoid_when = "a"\n'
        'rooms = ["foveal/papers/"]\nerrata = []\n[[claims]]\nid = "c"\nstatement = "[bold]s"\nfigure = "1"\n'
        'source = "s"\nmeasured_by = ""\nscale = "CPU"\nhere = "h"\n'
    )
    card = parse_card(text, "toy.toml")
    assert "[red]Toy[/red]" in printed(render_list([card]))
    shown = printed(render_card(card))
    assert "[IND] marks" in shown and "[bold]s" in shown
