"""Documentation made from the cards: the feature table of the README and one page per paper.

``python -m foveal.papers.tables`` writes it, ``python -m foveal.papers.tables --check`` names what is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from foveal.core.errors import ConfigError, FovealError
from foveal.papers.cards import CHECKOUT_RESULTS, Card, Claim, cards

ROOT = Path(__file__).resolve().parents[2]
_STAMP = "<!-- generated from foveal/papers/cards; change the card and run python -m foveal.papers.tables -->"


def feature_table(link: str = "docs/papers/") -> str:
    """A GitHub-markdown table with one row per paper; ``link`` leads from the page that shows it to ``<slug>.md``."""
    rows = [
        (
            f"[{_cell(card.name)}]({link}{card.slug}.md)",
            ", ".join(card.kind),
            _rooms(card.rooms),
            card.status,
            card.progress,
        )
        for card in cards().values()
    ]
    return _table(("paper", "what it is", "where", "status", "claims"), rows)


def card_page(card: Card) -> str:
    """The documentation page of one paper, as markdown that ends in a newline."""
    links = [f"[arXiv {card.arxiv}](https://arxiv.org/abs/{card.arxiv})"] if card.arxiv else []
    links += [f"[doi {card.doi}](https://doi.org/{card.doi})"] if card.doi else []
    links += [f"[authors' code]({card.code})"] if card.code else []
    title = f"*{_prose(card.title.rstrip('.'))}.*"
    citation = f"{_prose(', '.join(card.authors))} ({card.year}). {title} {_prose(card.venue.rstrip('.'))}."
    parts = [
        _STAMP,
        f"# {_prose(card.name)}",
        " ".join([citation, " · ".join(links)]).strip(),
        f"*{', '.join(card.kind)}* — {_prose(card.domain)}",
        _prose(card.summary),
        f"**Use when:** {_prose(card.use_when)}",
        f"**Avoid when:** {_prose(card.avoid_when)}",
        f"**Where:** {_rooms(card.rooms)} — {card.status}",
    ]
    parts += [f"**Describes:** {_prose(card.spec_version)}"] if card.spec_version else []
    parts += [
        f"## Claims ({card.progress})",
        _table(
            ("claim", "the paper's figure", "how it is measured here", "state"),
            [
                (
                    _cell(claim.statement),
                    f"{_cell(claim.figure)} ({_cell(claim.source)})",
                    _measure(claim),
                    _state(claim),
                )
                for claim in card.claims
            ],
        ),
    ]
    if card.errata:
        rows = [(_cell(item.where), _cell(item.what), _cell(item.foveal)) for item in card.errata]
        parts += ["## Errata", _table(("where", "what disagrees", "what foveal does"), rows)]
    return "\n\n".join(parts) + "\n"


def index_page() -> str:
    """``docs/papers/index.md``: the same table as in the README, linked from its own folder."""
    return f"{_STAMP}\n\n# Papers\n\n{feature_table(link='')}\n"


def replace_block(text: str, name: str, body: str) -> str:
    """``text`` with ``body`` between ``<!-- generated:NAME -->`` and ``<!-- /generated:NAME -->``.

    Raises:
        ConfigError: the two markers are not there exactly once each, in this order.
    """
    opening, closing = f"<!-- generated:{name} -->", f"<!-- /generated:{name} -->"
    start, end = text.find(opening), text.find(closing)
    if text.count(opening) != 1 or text.count(closing) != 1 or end < start:
        raise ConfigError(
            f"generated block {name!r}: found {text.count(opening)} × {opening} and {text.count(closing)} × {closing}; "
            "expected one of each, the opening marker first."
        )
    return f"{text[: start + len(opening)]}\n{body.strip()}\n{text[end:]}"


def write_docs(root: Path | str, check: bool = False) -> list[str]:
    """Write the pages of all papers, their index and the README's block ``feature-table`` below ``root``.

    With ``check`` nothing is written. A generated page whose card is gone counts as out of date, and is removed when
    writing; a page that somebody wrote by hand is left alone.

    Returns:
        The paths, relative to ``root``, that were out of date.

    Raises:
        ConfigError: README.md is missing or lacks the markers; the pages have been written by then.
    """
    root = Path(root)
    folder = root / "docs" / "papers"
    pages = {folder / f"{slug}.md": card_page(card) for slug, card in cards().items()}
    pages[folder / "index.md"] = index_page()
    stale = [path for path, text in pages.items() if not _same(path, text)]
    gone = [path for path in sorted(folder.glob("*.md")) if path not in pages and _read(path).startswith(_STAMP)]
    if not check:
        folder.mkdir(parents=True, exist_ok=True)
        for path in stale:
            path.write_text(pages[path], encoding="utf-8", newline="\n")
        for path in gone:
            path.unlink()
    readme = root / "README.md"
    if not readme.is_file():
        raise ConfigError(f"README.md: not found in {root}; expected a file with the block 'feature-table'.")
    old = _read(readme)
    new = replace_block(old, "feature-table", feature_table())
    stale += gone
    if new != old:
        stale.append(readme)
        if not check:
            readme.write_text(new, encoding="utf-8", newline="\n")
    return [path.relative_to(root).as_posix() for path in stale]


def main(argv: list[str] | None = None) -> int:
    """The command; returns 0 when all is up to date or written, 1 when a check finds stale files, 2 on an error."""
    parser = argparse.ArgumentParser(prog="python -m foveal.papers.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name the files out of date")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="the source checkout (default: the one this file is in)"
    )
    options = parser.parse_args(argv)
    try:
        stale = write_docs(options.root, check=options.check)
    except FovealError as error:
        print(error, file=sys.stderr)
        return 2
    for path in stale:
        print(f"{'out of date' if options.check else 'written'}: {path}")
    if options.check and stale:
        print("Run python -m foveal.papers.tables", file=sys.stderr)
        return 1
    return 0


def _measure(claim: Claim) -> str:
    parts = [f"{claim.scale}: needs {_cell(claim.needs)}"] if claim.needs else []
    parts += [_cell(claim.here) if claim.needs else f"{claim.scale}: {_cell(claim.here)}"] if claim.here else []
    parts += [f"`{claim.measured_by}`"] if claim.measured_by else []
    return "<br>".join(parts)


def _state(claim: Claim) -> str:
    file = claim.result_file
    if file is None or not file.is_relative_to(CHECKOUT_RESULTS):
        return str(claim.state)
    return f"[{claim.state}](../../benchmarks/results/claims/{claim.slug}/{claim.id}.json)"


def _rooms(rooms: Iterable[str]) -> str:
    return ", ".join(f"`{room}`" for room in rooms)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prose(text: str) -> str:
    """One paragraph in which markdown shows ``text`` as written: no emphasis, no HTML, no links by accident."""
    return re.sub(r"([\\`*_<>\[\]~])", r"\\\1", " ".join(text.split()))


def _cell(text: str) -> str:
    return _prose(text).replace("|", r"\|")


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _same(path: Path, text: str) -> bool:
    return path.is_file() and _read(path) == text


if __name__ == "__main__":
    sys.exit(main())
