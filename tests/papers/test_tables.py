"""The generated documentation: complete, safe as markdown, and noticed when out of date."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from foveal.core.errors import ConfigError
from foveal.papers import card_page, cards, feature_table, load_card, replace_block, write_docs
from foveal.papers.tables import ROOT, main

README = "# x\n<!-- generated:feature-table -->\nold\n<!-- /generated:feature-table -->\nend\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def cells(line: str) -> list[str]:
    return line.strip("|").replace(r"\|", "/").split("|")


def test_feature_table_has_a_row_for_every_card() -> None:
    head, rule, *rows = feature_table().splitlines()
    assert [cell.strip() for cell in cells(head)] == ["paper", "what it is", "where", "status", "claims"]
    assert set(rule) == set("| -")
    assert len(rows) == len(cards())
    for row, card in zip(rows, cards().values(), strict=True):
        assert len(cells(row)) == 5
        assert f"](docs/papers/{card.slug}.md)" in row
        assert f"`{card.rooms[0]}`" in row
        assert f"| {card.status} | {card.progress} |" in row


@pytest.mark.parametrize("slug", list(cards()))
def test_page_says_everything_the_card_says(slug: str) -> None:
    card = load_card(slug)
    page = card_page(card)
    assert "\n# " in page
    assert page.endswith("\n")
    assert str(card.year) in page
    assert all(f"`{room}`" in page for room in card.rooms)
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + len(card.claims) + (2 + len(card.errata) if card.errata else 0)
    for line in tables[: 2 + len(card.claims)]:
        assert len(cells(line)) == 4
    for line in tables[2 + len(card.claims) :]:
        assert len(cells(line)) == 3
    for claim in card.claims:
        assert str(claim.state) in page


def test_pages_show_text_as_written() -> None:
    card = replace(load_card("eca"), title="A *b* <script>.", summary="one | two\n[IND] `x`")
    page = card_page(card)
    assert r"*A \*b\* \<script\>.* CVPR 2020" in page
    assert r"one | two \[IND\] \`x\`" in page
    claim = replace(card.claims[0], statement="p(a|b)")
    assert r"| p(a\|b) |" in card_page(replace(card, claims=(claim,)))


def test_page_links_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("foveal.papers.cards", "foveal.papers.tables"):
        monkeypatch.setattr(import_module(name), "CHECKOUT_RESULTS", tmp_path)
    card = load_card("eca")
    file = tmp_path / "eca" / f"{card.claims[0].id}.json"
    file.parent.mkdir()
    file.write_text('{"verdict": "direction holds"}')
    page = card_page(card)
    assert f"[direction holds](../../benchmarks/results/claims/eca/{file.name})" in page
    assert f"## Claims (1/{len(card.claims)} measured)" in page
    assert f"1/{len(card.claims)} measured" in feature_table()


def test_replace_block() -> None:
    name = "feature-table"
    new = replace_block(README, name, "\nbody\n")
    assert new == README.replace("old", "body")
    assert replace_block(new, name, "body") == new


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "<!-- generated:feature-table -->",
        "<!-- /generated:feature-table --><!-- generated:feature-table -->",
        README + README,
    ],
)
def test_replace_block_needs_its_markers(text: str) -> None:
    with pytest.raises(ConfigError, match="generated block 'feature-table': found"):
        replace_block(text, "feature-table", "body")


def test_write_then_check(root: Path) -> None:
    names = [f"docs/papers/{slug}.md" for slug in cards()] + ["docs/papers/index.md", "README.md"]
    assert write_docs(root, check=True) == names
    assert not (root / "docs").exists()
    assert write_docs(root) == names
    assert write_docs(root, check=True) == []
    assert write_docs(root) == []
    assert feature_table() in (root / "README.md").read_text()
    assert "](eca.md)" in (root / "docs/papers/index.md").read_text()


def test_stale_files_are_named(root: Path) -> None:
    write_docs(root)
    folder = root / "docs" / "papers"
    (folder / "eca.md").write_text("changed by hand")
    (folder / "gone.md").write_text((folder / "index.md").read_text())
    (folder / "notes.md").write_text("written by hand")
    readme = root / "README.md"
    readme.write_text(readme.read_text().replace("0/", "9/", 1))
    stale = ["docs/papers/eca.md", "docs/papers/gone.md", "README.md"]
    assert write_docs(root, check=True) == stale
    assert (folder / "eca.md").read_text() == "changed by hand"
    assert write_docs(root) == stale
    assert write_docs(root, check=True) == []
    assert not (folder / "gone.md").exists()
    assert (folder / "notes.md").exists()


def test_builds_are_identical(tmp_path: Path) -> None:
    texts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(README)
        write_docs(tmp_path / name)
        texts.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.md")})
    assert texts[0] == texts[1]


def test_readme_without_markers_or_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"README\.md: not found"):
        write_docs(tmp_path, check=True)
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(ConfigError, match="expected one of each"):
        write_docs(tmp_path)


def test_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(root)]
    assert main([*arguments, "--check"]) == 1
    assert "out of date: docs/papers/eca.md" in capsys.readouterr().out
    assert main(arguments) == 0
    assert main([*arguments, "--check"]) == 0
    (root / "README.md").unlink()
    assert main([*arguments, "--check"]) == 2
    assert "README.md: not found" in capsys.readouterr().err


def test_documentation_of_this_checkout_is_up_to_date() -> None:
    assert write_docs(ROOT, check=True) == [], "run python -m foveal.papers.tables"
