"""The catalogue of papers: cards, the state of their claims, and the tables made from them.

::

    from foveal.papers import cards, search
    for claim in cards()["dhsa"].claims:
        print(claim.statement, "→", claim.state)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from foveal.papers.cards import Card, Claim, ClaimState, Erratum, cards, load_card, search, slugs

if TYPE_CHECKING:
    from foveal.papers.show import render_card, render_list
    from foveal.papers.tables import card_page, feature_table, replace_block, write_docs

__all__ = [
    "Card",
    "Claim",
    "ClaimState",
    "Erratum",
    "card_page",
    "cards",
    "feature_table",
    "load_card",
    "render_card",
    "render_list",
    "replace_block",
    "search",
    "slugs",
    "write_docs",
]

_LATER = {
    "render_card": "foveal.papers.show",
    "render_list": "foveal.papers.show",
    "card_page": "foveal.papers.tables",
    "feature_table": "foveal.papers.tables",
    "replace_block": "foveal.papers.tables",
    "write_docs": "foveal.papers.tables",
}


def __getattr__(name: str) -> Any:
    """Load the renderers at first use: rich stays unloaded, and ``python -m foveal.papers.tables`` runs once."""
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
