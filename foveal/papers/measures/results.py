"""Writing the result of a claim's measurement, with where and how it was made."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ...core.errors import ConfigError, nearest
from ...core.provenance import provenance
from ..cards import CHECKOUT_RESULTS, VERDICTS, load_card


def summary(values: Sequence[float]) -> dict[str, float]:
    """``mean`` and ``spread`` (standard deviation, 0 for one) over seeds."""
    return {"mean": round(fmean(values), 5), "spread": round(stdev(values), 5) if len(values) > 1 else 0.0}


def sign_test(differences: Sequence[float]) -> dict[str, Any]:
    """How many differences are positive and negative, and the two-sided p of the sign test; ties are left out."""
    up, down = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    tail = sum(math.comb(up + down, i) for i in range(min(up, down) + 1)) / 2 ** (up + down)
    return {"positive": up, "negative": down, "p": round(min(1.0, 2 * tail), 4)}


def write_result(
    slug: str, claim_id: str, verdict: str, measured: dict[str, Any], *, seed: int, out: Path | None = None
) -> dict[str, Any]:
    """Write ``<out>/<slug>/<claim_id>.json`` and return its content; the file appears whole or not at all.

    Args:
        slug, claim_id: the claim in the paper's card.
        verdict: one of the three verdicts of :class:`foveal.papers.cards.ClaimState`.
        measured: numbers, by name.
        seed: first seed.
        out: folder of result files; default that of the source checkout.

    Raises:
        ConfigError: no such claim or verdict.
    """
    claims = {claim.id: claim for claim in load_card(slug).claims}
    if claim_id not in claims:
        raise ConfigError(f"papers: {slug} has no claim {claim_id!r}. {nearest(claim_id, claims)}")
    if verdict not in [str(v) for v in VERDICTS]:
        raise ConfigError(f"verdict is {verdict!r}; expected one of {', '.join(repr(str(v)) for v in VERDICTS)}.")
    here = provenance()
    result = {
        "schema": 1,
        "paper": slug,
        "claim": claim_id,
        "statement": claims[claim_id].statement,
        "figure": claims[claim_id].figure,
        "verdict": verdict,
        "measured": measured,
        "seed": seed,
        "date": datetime.date.today().isoformat(),
        "versions": {name: here[name] for name in ("foveal", "torch", "python")},
        "machine": here["machine"],
        "git": here["git"],
    }
    path = (CHECKOUT_RESULTS if out is None else out) / slug / f"{claim_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
    return result
