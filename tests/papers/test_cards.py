"""The cards: every one valid, states derived from result files, and a clear message for every broken card."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from foveal.core.errors import ConfigError
from foveal.papers import Card, Claim, ClaimState, cards, load_card, search, slugs
from foveal.papers.cards import KINDS, SCALES, parse_card

module = importlib.import_module("foveal.papers.cards")  # the package's attribute `cards` is the function

EXPECTED = {
    "attentionguard",
    "capimagine",
    "care_edit",
    "carve",
    "circuit_reuse",
    "clear",
    "context_awareness",
    "csa",
    "daily_papers",
    "dhsa",
    "eca",
    "eeg_channel_attention",
    "eeg_tgat",
    "fe_lsd",
    "flux",
    "fna",
    "gated",
    "gna",
    "hylra",
    "jal_turn",
    "kinetics",
    "longca_bench",
    "mambattention",
    "moda",
    "nprf_rpe",
    "preplan_anchor",
    "rcmha",
    "rettention",
    "routing",
    "scatterformer",
    "secondary_sinks",
    "shrp",
    "slab",
    "sparsed",
    "titans",
    "var",
    "vhr",
    "vmoba",
}

GOOD = """
schema = 1
slug = "toy"
name = "Toy"
title = "A toy paper"
authors = ["A. Author"]
year = 2024
venue = "nowhere"
kind = ["pattern"]
domain = "tests"
summary = "A summary."
use_when = "testing"
avoid_when = "not testing"
rooms = ["foveal/papers/cards.py", "foveal/nowhere/toy.py"]

[[claims]]
id = "faster"
statement = "It is faster"
figure = "2 ×"
source = "table 1"
measured_by = ""
scale = "CPU"
here = "the same on a small case"

[[claims]]
id = "better"
statement = "It is better"
figure = "90 % against 80 %"
source = "abstract"
measured_by = ""
scale = "not here"
here = ""
needs = "the weights"

[[errata]]
where = "paper"
what = "A typo."
foveal = "Corrects it."
"""


def toy() -> Card:
    return parse_card(GOOD, "toy.toml")


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Empty folders in place of the checkout's and the package's result folders."""
    roots = tmp_path / "checkout", tmp_path / "packaged"
    monkeypatch.setattr(module, "CHECKOUT_RESULTS", roots[0])
    monkeypatch.setattr(module, "PACKAGED_RESULTS", roots[1])
    return roots


def put(root: Path, claim: Claim, text: str) -> None:
    file = root / claim.slug / f"{claim.id}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


# ---- the packaged cards


def test_exactly_the_papers_of_the_catalogue() -> None:
    assert set(slugs()) == EXPECTED
    assert len(EXPECTED - {"daily_papers"}) == 37  # the entries of the page, which has a card of its own
    assert list(cards()) == sorted(EXPECTED)


@pytest.mark.parametrize("slug", sorted(EXPECTED))
def test_card_is_valid(slug: str) -> None:
    card = load_card(slug)
    assert card.slug == slug
    assert set(card.kind) <= set(KINDS)
    ids = [claim.id for claim in card.claims]
    assert len(set(ids)) == len(ids)
    for claim in card.claims:
        assert claim.scale in SCALES
        assert bool(claim.needs) == (claim.scale == "not here")
        assert claim.state in ClaimState


def test_result_files_belong_to_a_claim() -> None:
    """A result under a misspelt name would never be seen."""
    known = {(card.slug, claim.id) for card in cards().values() for claim in card.claims}
    for root in (module.CHECKOUT_RESULTS, module.PACKAGED_RESULTS):
        for file in root.glob("*/*.json"):
            assert (file.parent.name, file.stem) in known, file


def test_named_measurements_exist() -> None:
    for card in cards().values():
        for claim in card.claims:
            if claim.measured_by:
                name, _, function = claim.measured_by.partition(":")
                assert callable(getattr(importlib.import_module(name), function)), claim.measured_by


def test_cards_are_read_once() -> None:
    assert load_card("eca") is load_card("eca") is cards()["eca"]


def test_unknown_slug_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'titan' is not the slug of a card\. Did you mean 'titans'\?"):
        load_card("titan")


def test_imports_without_torch_and_transformers() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import foveal.papers, foveal.papers.show, foveal.papers.tables\n"
        "foveal.papers.cards()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(module.__file__).parents[2])


# ---- states, rooms and status


def test_state_without_results(results: tuple[Path, Path]) -> None:
    faster, better = toy().claims
    assert faster.state is ClaimState.NOT_YET_MEASURED
    assert better.state is ClaimState.OUT_OF_REACH
    assert toy().progress == "0/2 measured"


def test_state_names_are_the_documented_ones() -> None:
    assert [str(state) for state in ClaimState] == [
        "reproduced",
        "direction holds",
        "not reproduced",
        "not yet measured",
        "needs hardware or weights we do not have",
    ]


@pytest.mark.parametrize("verdict", ["reproduced", "direction holds", "not reproduced"])
@pytest.mark.parametrize("place", [0, 1])
def test_state_is_the_verdict(results: tuple[Path, Path], verdict: str, place: int) -> None:
    card = toy()
    for claim in card.claims:  # a result also decides a claim whose scale is "not here"
        put(results[place], claim, json.dumps({"verdict": verdict, "ratio": 1.9}))
    assert [str(claim.state) for claim in card.claims] == [verdict] * 2
    assert card.progress == "2/2 measured"


def test_checkout_result_goes_before_the_packaged_copy(results: tuple[Path, Path]) -> None:
    claim = toy().claims[0]
    put(results[1], claim, '{"verdict": "reproduced"}')
    assert claim.state is ClaimState.REPRODUCED
    put(results[0], claim, '{"verdict": "not reproduced"}')
    assert claim.state is ClaimState.NOT_REPRODUCED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"toy/faster\.json: the key verdict is missing; expected one of 'reproduced', 'direction holds'"),
        ("[]", "the key verdict is missing"),
        ("{", "not valid JSON"),
        ('{"verdict": "reproducd"}', r"verdict is 'reproducd'; .* Did you mean 'reproduced'\?"),
        ('{"verdict": "not yet measured"}', "verdict is 'not yet measured'; expected one of"),
        ('{"verdict": true}', "verdict is True; expected one of"),
        ('{"verdict": ["reproduced"]}', "verdict is .'reproduced'.; expected one of"),
    ],
)
def test_result_without_a_proper_verdict(results: tuple[Path, Path], text: str, message: str) -> None:
    claim = toy().claims[0]
    put(results[0], claim, text)
    with pytest.raises(ConfigError, match=message):
        _ = claim.state


def test_status_follows_the_rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HOUSE", tmp_path)
    card = parse_card(GOOD.replace("foveal/nowhere/toy.py", "foveal/toys/"), "toy.toml")
    assert card.rooms_present() == ()
    assert card.status == "planned"
    (tmp_path / "foveal" / "toys" / "__pycache__").mkdir(parents=True)
    (tmp_path / "foveal" / "toys" / "__init__.py").touch()
    assert card.status == "planned"  # an empty package is no room yet
    (tmp_path / "foveal" / "toys" / "toy.py").write_text("x = 1\n")
    assert card.rooms_present() == ("foveal/toys/",)
    assert card.status == "partly"
    (tmp_path / "foveal" / "papers").mkdir()
    (tmp_path / "foveal" / "papers" / "cards.py").touch()
    assert card.status == "implemented"


# ---- broken cards

BROKEN = [
    ("schema = 1", "schema = 2", r"toy\.toml: schema is 2 \(int\); expected 1"),
    ("schema = 1", "", r"toy\.toml: the key schema is missing; expected an integer"),
    ('slug = "toy"', 'slug = "Toy"', "slug is 'Toy'"),
    ('slug = "toy"', 'slug = "tor"', "slug is 'tor' .* expected the name of the file"),
    ("year = 2024", 'year = "2024"', r"year is '2024' \(str\); expected an integer"),
    ("year = 2024", "year = true", r"year is True \(bool\); expected an integer"),
    (
        'title = "A toy paper"',
        "",
        r"the key title is missing; expected a text .* received: schema, slug, name, authors",
    ),
    ('title = "A toy paper"', 'titel = "A toy paper"', r"unknown key titel .* Did you mean 'title'\?"),
    ('title = "A toy paper"', 'title = " "', "title is '' .* expected a text that is not empty"),
    ('title = "A toy paper"', "title = 3", r"title is 3 \(int\); expected a string"),
    (
        'authors = ["A. Author"]',
        'authors = "A. Author"',
        r"authors is 'A\. Author' \(str\); expected a list of strings",
    ),
    ('authors = ["A. Author"]', "authors = []", "authors is .* at least one entry"),
    ('authors = ["A. Author"]', "authors = [1]", r"authors\[0\] is 1 \(int\)"),
    ('kind = ["pattern"]', 'kind = ["patern"]', r"kind\[0\] is 'patern' .* Did you mean 'pattern'\?"),
    ('kind = ["pattern"]', 'kind = ["pattern", "pattern"]', "kind is .* no entry twice"),
    ('"foveal/nowhere/toy.py"', '"patterns/toy.py"', r"rooms\[1\] is 'patterns/toy\.py' .* starts with foveal/"),
    ('domain = "tests"', 'domain = "tests"\narxiv = "arXiv 2510"', "arxiv is 'arXiv 2510' .* an arXiv number"),
    ('domain = "tests"', 'domain = "tests"\ncode = "owner/name"', "code is 'owner/name' .* an https URL"),
    ('domain = "tests"', 'domain = "tests"\ndoi = "https://doi.org/10.1/x"', "doi is .* a DOI such as"),
    ('id = "better"', 'id = "faster"', r"claims\[1\]\.id is 'faster' .* no other claim"),
    ('id = "better"', 'id = "Better one"', r"claims\[1\]\.id is 'Better one' .* joined by -"),
    ('figure = "2 ×"', 'figure = ""', r"claims\[0\]\.figure is ''"),
    ('figure = "2 ×"', "figure = 2", r"claims\[0\]\.figure is 2 \(int\); expected a string"),
    ('figure = "2 ×"', "", r"the key claims\[0\]\.figure is missing"),
    ('figure = "2 ×"', 'figure = "2 ×"\nfigures = ""', r"unknown key claims\[0\]\.figures .* Did you mean 'figure'\?"),
    ('scale = "CPU"', 'scale = "gpu"', r"claims\[0\]\.scale is 'gpu' .* one of 'CPU', 'one GPU', 'not here'"),
    ('here = "the same on a small case"', 'here = ""', r"claims\[0\]\.here is ''"),
    ('here = "the same on a small case"', 'here = "x"\nneeds = "a GPU"', r"claims\[0\]\.needs is .* scale is 'CPU'"),
    ('needs = "the weights"', "", r"the key claims\[1\]\.needs is missing"),
    ('measured_by = ""\nscale = "CPU"', 'measured_by = "bench"\nscale = "CPU"', r"claims\[0\]\.measured_by is 'bench'"),
    ('where = "paper"', 'where = "papers"', r"errata\[0\]\.where is 'papers' .* Did you mean 'paper'\?"),
    ('foveal = "Corrects it."', "", r"the key errata\[0\]\.foveal is missing"),
    ('what = "A typo."', 'what = "A typo."\nwhy = "?"', r"unknown key errata\[0\]\.why"),
    ("[[errata]]", "[errata]", "errata is .* tables, each headed"),
    ("[[errata]]", "errata = ]", r"toy\.toml: not valid TOML"),
]


def test_the_good_card_is_good() -> None:
    card = toy()
    assert (card.arxiv, card.doi, card.code, card.spec_version) == ("", "", "", "")
    assert [claim.slug for claim in card.claims] == ["toy", "toy"]
    assert card.errata[0].where == "paper"
    with pytest.raises(AttributeError):
        card.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(("old", "new", "message"), BROKEN)
def test_broken_card_names_the_field(old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=r"toy\.toml: ") as caught:
        parse_card(GOOD.replace(old, new, 1), "toy.toml")
    assert caught.match(message)


def test_card_without_claims_or_errata() -> None:
    head, _, tail = GOOD.partition("[[claims]]")
    errata = "[[errata]]" + tail.partition("[[errata]]")[2]
    with pytest.raises(ConfigError, match="the key claims is missing"):
        parse_card(head + errata, "toy.toml")
    with pytest.raises(ConfigError, match=r"claims is .* at least 1 tables"):
        parse_card(head + "claims = []\n" + errata, "toy.toml")
    with pytest.raises(ConfigError, match="the key errata is missing"):
        parse_card(GOOD.replace(errata, ""), "toy.toml")
    assert parse_card(head + "errata = []\n" + GOOD[len(head) :].replace(errata, ""), "toy.toml").errata == ()


# ---- search


def found(query: str) -> list[str]:
    return [card.slug for card in search(query)]


def test_search_needs_every_word() -> None:
    both = set(found("channel")) & set(found("eeg"))
    assert both == set(found("channel eeg")) == set(found("EEG  Channel"))
    assert "eeg_channel_attention" in both
    assert found("channel nosuchword") == []


def test_search_ranks_slug_and_name_first() -> None:
    assert found("eeg")[:2] == ["eeg_channel_attention", "eeg_tgat"]
    for card in cards().values():
        assert found(card.slug)[0] == card.slug
        assert card.slug in found(card.name)


def test_search_looks_at_authors_kind_and_domain() -> None:
    assert "attentionguard" in found("Navneet")
    assert set(found("catalogue")) >= {"daily_papers"}
    assert "dhsa" in found("little memory")


def test_every_title_finds_its_own_paper() -> None:
    for card in cards().values():
        assert found(card.title)[0] == card.slug


def test_empty_search_finds_all() -> None:
    assert found("  ") == sorted(EXPECTED)
