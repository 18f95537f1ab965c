"""Measure the claims of a card again: every claim that names a function and fits this machine.

A measure is a function ``measure(*, out)`` in ``foveal/papers/measures`` that writes the claim's result file below ``out`` (default the
source checkout's results) and returns its content; the state of the claim follows from that file.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, DataError, ModelError, nearest
from .cards import CHECKOUT_RESULTS, Card, Claim, load_card

Measure = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """What happened to one claim.

    Attributes:
        claim: of the card. result: content of the result file just written, or None. why_not: why nothing was measured.
    """

    claim: Claim
    result: dict[str, Any] | None = None
    why_not: str = ""

    @property
    def ours(self) -> str:
        """Our figure in one line."""
        if self.result is None:
            return ""
        measured = self.result["measured"]
        if "ours" in measured:
            return str(measured["ours"])
        plain = {k: v for k, v in measured.items() if isinstance(v, (int, float, str))}
        return ", ".join(f"{k} {v}" for k, v in plain.items())

    @property
    def verdict(self) -> str:
        return "" if self.result is None else str(self.result["verdict"])


def claims_of(slug: str, claim_id: str | None = None) -> tuple[Card, list[Claim]]:
    """The card and the claims asked for.

    Raises:
        ConfigError: no such card or claim.
    """
    card = load_card(slug)
    known = {claim.id: claim for claim in card.claims}
    if claim_id is None:
        return card, list(card.claims)
    if claim_id not in known:
        raise ConfigError(f"papers: {slug} has no claim {claim_id!r}. {nearest(claim_id, known)}")
    return card, [known[claim_id]]


def obstacle(claim: Claim) -> str:
    """Why this machine cannot measure the claim now; empty when it can."""
    if claim.scale == "not here":
        return f"needs {claim.needs}"
    if not claim.measured_by:
        return "no measurement is written yet"
    if claim.scale == "one GPU":
        import torch

        if not torch.cuda.is_available():
            return "needs a CUDA GPU, and torch sees none here"
    return ""


def measure_of(claim: Claim) -> Measure:
    """The function that the claim names.

    Raises:
        ConfigError: it does not exist.
    """
    module, _, name = claim.measured_by.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"papers: {claim.slug}/{claim.id} names {claim.measured_by!r}, which cannot be loaded: {error}."
        ) from error


def measured(claim: Claim, *, out: Path | None = None, go_on: bool = False) -> Outcome:
    """Measure one claim; one that this machine cannot measure says why.

    Args:
        out: folder of result files; default the source checkout's. go_on: a model or data that is not there is such a reason.

    Raises:
        ConfigError: no such function. ModelError, DataError: what it needs is not there, unless ``go_on``.
    """
    why = obstacle(claim)
    if why:
        return Outcome(claim, why_not=why)
    try:
        return Outcome(claim, measure_of(claim)(out=out))
    except (ModelError, DataError) as error:
        if not go_on:
            raise
        return Outcome(claim, why_not=str(error))


def reproduce(slug: str, claim_id: str | None = None, *, out: Path | None = None) -> Iterator[Outcome]:
    """:func:`measured` of one claim, or of all of a card, which go on where a model or data is not there.

    Raises:
        ConfigError: no such card, claim or function. ModelError, DataError: what ``claim_id`` needs is not there.
    """
    _, claims = claims_of(slug, claim_id)
    for claim in claims:
        yield measured(claim, out=out, go_on=claim_id is None)


def stored(claim: Claim) -> Outcome:
    """The outcome that the claim's result file tells, without measuring."""
    file = claim.result_file
    if file is None:
        return Outcome(claim, why_not=obstacle(claim) or "not yet measured")
    return Outcome(claim, json.loads(file.read_text(encoding="utf-8")))


def default_out() -> Path | None:
    """None (the checkout's folder) in a source checkout; ``./claims`` when foveal is installed."""
    return None if (CHECKOUT_RESULTS.parents[2] / "pyproject.toml").is_file() else Path("claims")
