"""Paper cards: what each paper claims, what is known to disagree in it, and what has been measured here.

A card is one TOML file, ``foveal/papers/cards/<slug>.toml``, and is read strictly: an unknown key, a missing key or a
wrong value raises :class:`~foveal.core.errors.ConfigError`. The state of a claim is derived from result files and is
written in no card.
"""

from __future__ import annotations

import functools
import json
import re
import tomllib
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

from foveal.core.errors import ConfigError, nearest
from foveal.papers.fields import Fields

SCHEMA = 1
KINDS = (
    "pattern",
    "operator",
    "layer",
    "policy",
    "recipe",
    "probe",
    "intervention",
    "model",
    "application",
    "benchmark",
    "catalogue",
    "simulator",
)
SCALES = ("CPU", "one GPU", "not here")
ERRATUM_PLACES = ("paper", "authors' code", "paper against code", "arithmetic", "spec sheet")

_PACKAGE = Path(__file__).resolve().parents[1]
_HOUSE = _PACKAGE.parent  # the source checkout, or site-packages
CHECKOUT_RESULTS = _HOUSE / "benchmarks" / "results" / "claims"
PACKAGED_RESULTS = _PACKAGE / "papers" / "results"

_SLUG = re.compile(r"[a-z0-9]+(_[a-z0-9]+)*")
_CLAIM_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_ARXIV = re.compile(r"\d{4}\.\d{4,5}|[a-z-]+/\d{7}")
_DOI = re.compile(r"10\.\d{4,9}/\S+")


class ClaimState(StrEnum):
    """What is known here about a claim. The first three are verdicts of a result file."""

    REPRODUCED = "reproduced"
    DIRECTION_HOLDS = "direction holds"
    NOT_REPRODUCED = "not reproduced"
    NOT_YET_MEASURED = "not yet measured"
    OUT_OF_REACH = "needs hardware or weights we do not have"

    @property
    def measured(self) -> bool:
        """Whether a measurement decided this state."""
        return self in VERDICTS


VERDICTS = (ClaimState.REPRODUCED, ClaimState.DIRECTION_HOLDS, ClaimState.NOT_REPRODUCED)


@dataclass(frozen=True)
class Claim:
    """One comparable result of a paper.

    ``figure`` is the paper's own figure, ``here`` what is measured instead and when it counts as success,
    ``measured_by`` the function ``module:function`` that does so (empty while there is none), ``needs`` what is
    missing when ``scale`` is ``"not here"``. ``slug`` is the paper's, and comes from the card.
    """

    slug: str
    id: str
    statement: str
    figure: str
    source: str
    measured_by: str
    scale: str
    here: str
    needs: str = ""

    @property
    def result_file(self) -> Path | None:
        """The result that decides this claim: the one in the source checkout, else the packaged copy, else None."""
        for root in (CHECKOUT_RESULTS, PACKAGED_RESULTS):
            file = root / self.slug / f"{self.id}.json"
            if file.is_file():
                return file
        return None

    @property
    def state(self) -> ClaimState:
        """The verdict of the result file, or why there is none.

        Raises:
            ConfigError: the result file is no JSON object, or its ``verdict`` is missing or unknown.
        """
        file = self.result_file
        if file is not None:
            return _verdict(file)
        return ClaimState.OUT_OF_REACH if self.scale == "not here" else ClaimState.NOT_YET_MEASURED


@dataclass(frozen=True)
class Erratum:
    """A disagreement between paper, authors' code and arithmetic, and what foveal does about it."""

    where: str
    what: str
    foveal: str


@dataclass(frozen=True)
class Card:
    """Everything that foveal states about one paper; see the fields of ``foveal/papers/cards/*.toml``."""

    slug: str
    name: str
    title: str
    authors: tuple[str, ...]
    year: int
    venue: str
    kind: tuple[str, ...]
    domain: str
    summary: str
    use_when: str
    avoid_when: str
    rooms: tuple[str, ...]
    claims: tuple[Claim, ...]
    errata: tuple[Erratum, ...]
    arxiv: str = ""
    doi: str = ""
    code: str = ""
    spec_version: str = ""

    def rooms_present(self) -> tuple[str, ...]:
        """The rooms that exist in the installed package. A folder counts once a module in it holds something."""
        return tuple(room for room in self.rooms if _is_room(_HOUSE / room))

    @property
    def status(self) -> str:
        """``"implemented"`` when all rooms exist, ``"partly"`` when some do, ``"planned"`` when none does."""
        present = len(self.rooms_present())
        if present == len(self.rooms):
            return "implemented"
        return "partly" if present else "planned"

    @property
    def progress(self) -> str:
        """How many claims have a verdict, such as ``"2/5 measured"``."""
        return f"{sum(claim.state.measured for claim in self.claims)}/{len(self.claims)} measured"


def slugs() -> tuple[str, ...]:
    """The slugs of all packaged cards, sorted."""
    return tuple(sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml")))


@functools.cache
def load_card(slug: str) -> Card:
    """The card of one paper.

    Raises:
        ConfigError: there is no such card, or its file breaks the schema.
    """
    known = slugs()
    if slug not in known:
        raise ConfigError(f"papers: {slug!r} is not the slug of a card. {nearest(slug, known)}")
    return parse_card((_folder() / f"{slug}.toml").read_text(encoding="utf-8"), f"{slug}.toml")


def cards() -> dict[str, Card]:
    """All cards by slug, sorted; read at the first call.

    Raises:
        ConfigError: a card breaks the schema.
    """
    return {slug: load_card(slug) for slug in slugs()}


def search(query: str) -> list[Card]:
    """The cards that contain every word of ``query``, case-insensitively; hits in slug or name come first.

    Looks at slug, name, title, authors, summary, kind and domain. An empty query finds every card.
    """
    words = query.casefold().split()
    found: list[tuple[int, str, Card]] = []
    for card in cards().values():
        short = f"{card.slug} {card.name}".casefold()
        title = card.title.casefold()
        rest = " ".join((*card.authors, card.summary, *card.kind, card.domain)).casefold()
        ranks = [next((rank for rank, text in enumerate((short, title, rest)) if word in text), None) for word in words]
        if None not in ranks:
            found.append((sum(rank for rank in ranks if rank is not None), card.slug, card))
    return [card for _, _, card in sorted(found, key=lambda hit: hit[:2])]


def parse_card(text: str, file: str) -> Card:
    """Read and validate the TOML ``text`` of a card; ``file`` is its name, ``<slug>.toml``, used in messages too.

    Raises:
        ConfigError: naming the file, the key, what was received and what was expected.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {error}") from None
    top = Fields(data, file, "")
    top.only(_CARD_KEYS)
    schema = top.integer("schema")
    if schema != SCHEMA:
        raise top.error("schema", schema, f"{SCHEMA}, the only schema that this version reads")
    slug = top.string("slug", form=_SLUG, expected="lower-case words joined by _")
    if f"{slug}.toml" != file.rpartition("/")[2]:
        raise top.error("slug", slug, "the name of the file without .toml")
    claims = tuple(_claim(fields, slug) for fields in top.tables("claims", at_least=1))
    seen: set[str] = set()
    for index, claim in enumerate(claims):
        if claim.id in seen:
            raise top.error(f"claims[{index}].id", claim.id, "an id that no other claim of the card has")
        seen.add(claim.id)
    return Card(
        slug=slug,
        name=top.string("name"),
        title=top.string("title"),
        authors=top.strings("authors"),
        year=top.integer("year"),
        venue=top.string("venue"),
        arxiv=top.string("arxiv", optional=True, form=_ARXIV, expected="an arXiv number such as '2510.24606'"),
        doi=top.string(
            "doi", optional=True, form=_DOI, expected="a DOI such as '10.1000/182', without https://doi.org/"
        ),
        code=top.string("code", optional=True, form=re.compile(r"https://\S+"), expected="an https URL"),
        kind=top.strings("kind", among=KINDS),
        domain=top.string("domain"),
        summary=top.string("summary"),
        use_when=top.string("use_when"),
        avoid_when=top.string("avoid_when"),
        rooms=top.strings("rooms", form=re.compile(r"foveal/\w[\w./]*"), expected="a path that starts with foveal/"),
        spec_version=top.string("spec_version", optional=True),
        claims=claims,
        errata=tuple(_erratum(fields) for fields in top.tables("errata", at_least=0)),
    )


_CARD_KEYS = {"schema", *Card.__dataclass_fields__}
_CLAIM_KEYS = set(Claim.__dataclass_fields__) - {"slug"}
_ERRATUM_KEYS = set(Erratum.__dataclass_fields__)


def _claim(fields: Fields, slug: str) -> Claim:
    fields.only(_CLAIM_KEYS)
    scale = fields.string("scale", among=SCALES)
    away = scale == "not here"
    needs = fields.string("needs") if away else fields.string("needs", optional=True)
    if needs and not away:
        raise fields.error("needs", needs, f"no such key, because scale is {scale!r} and not 'not here'")
    return Claim(
        slug=slug,
        id=fields.string("id", form=_CLAIM_ID, expected="lower-case words joined by -"),
        statement=fields.string("statement"),
        figure=fields.string("figure"),
        source=fields.string("source"),
        measured_by=fields.string(
            "measured_by", empty=True, form=_FUNCTION, expected="'package.module:function' or ''"
        ),
        scale=scale,
        here=fields.string("here", empty=away),
        needs=needs,
    )


def _erratum(fields: Fields) -> Erratum:
    fields.only(_ERRATUM_KEYS)
    return Erratum(
        where=fields.string("where", among=ERRATUM_PLACES), what=fields.string("what"), foveal=fields.string("foveal")
    )


def _folder() -> Any:
    return resources.files("foveal.papers") / "cards"


def _is_room(path: Path) -> bool:
    if path.is_dir():
        return any(file.stat().st_size for file in path.rglob("*.py"))
    return path.is_file()


def _verdict(file: Path) -> ClaimState:
    name = "/".join(file.parts[-2:])
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"result {name}: not valid JSON: {error}. Measure the claim again.") from None
    wanted = "one of " + ", ".join(repr(str(verdict)) for verdict in VERDICTS)
    if not isinstance(data, dict) or "verdict" not in data:
        raise ConfigError(f"result {name}: the key verdict is missing; expected {wanted}. Measure the claim again.")
    verdict = data["verdict"]
    if verdict not in [str(known) for known in VERDICTS]:
        hint = nearest(str(verdict), [str(known) for known in VERDICTS])
        raise ConfigError(f"result {name}: verdict is {verdict!r}; expected {wanted}. {hint}")
    return ClaimState(verdict)
