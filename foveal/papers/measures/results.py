"""Writing the result of a claim's measurement, with where and how it was made."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...core.errors import ConfigError, nearest
from ..cards import CHECKOUT_RESULTS, VERDICTS, load_card


def machine() -> dict[str, Any]:
    """Processor, cores, threads, memory and accelerator of this machine."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    found: dict[str, Any] = {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
    }
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    return found


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
        "versions": {"foveal": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "machine": machine(),
    }
    path = (CHECKOUT_RESULTS if out is None else out) / slug / f"{claim_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
    return result
