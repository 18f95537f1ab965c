"""From raw measurements to figures: paired ratios, losses with intervals, and who wins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch


def increase(policy_nll: Sequence[float], dense_nll: Sequence[float]) -> tuple[float, list[float]]:
    """Relative increase of perplexity and its 95 % interval, from paired per-token losses (tokens taken as independent)."""
    difference = torch.tensor(policy_nll, dtype=torch.float64) - torch.tensor(dense_nll, dtype=torch.float64)
    mean = float(difference.mean())
    half = 1.96 * float(difference.std()) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return math.expm1(mean), [math.expm1(mean - half), math.expm1(mean + half)]


def perplexity(nll: Sequence[float]) -> float:
    """exp of the mean loss."""
    return math.exp(sum(nll) / len(nll))


def ratios(dense: Sequence[dict[str, Any]], policy: Sequence[dict[str, Any]], field: str) -> list[float]:
    """Dense time over policy time, each policy run against the mean of the dense runs of its own session."""
    out = []
    for run in policy:
        beside = [d[field] for d in dense if d["session"] == run["session"]]
        if beside:
            out.append(sum(beside) / len(beside) / run[field])
    return out


def middle(values: Sequence[float]) -> float:
    """The median; 1.0 of nothing."""
    return float(median(values)) if values else 1.0


def judge(
    candidates: list[dict[str, Any]], baseline: dict[str, Any], limit: float, informative: bool
) -> tuple[str, str]:
    """Write ``verdict`` and ``why`` into every candidate; return the chosen name and the reason.

    A candidate is allowed when its perplexity, teacher-forced and through cached decoding, rises by at most ``limit`` and it
    finds as many needles as dense does. The fastest prefill among the allowed wins, if it is faster than dense at all.
    """
    for c in candidates:
        why = ""
        if c["ppl_increase"] > limit:
            why = f"perplexity {c['ppl_increase']:+.2%} is over the limit of {limit:.2%}"
        elif c["decode_ppl_increase"] > limit:
            why = f"perplexity through cached decoding {c['decode_ppl_increase']:+.2%} is over the limit of {limit:.2%}"
        elif informative and isinstance(c["needle"], float) and c["needle"] < baseline["needle"]:
            why = f"finds {c['needle']:.0%} of the needles; dense finds {baseline['needle']:.0%}"
        if why:
            c["verdict"], c["why"] = "over the loss limit", why
        elif c["prefill_speedup"] <= 1.0 and not _is_dense(c):
            c["verdict"], c["why"] = "slower than dense", f"prefill takes {1 / c['prefill_speedup']:.2f}× dense's time"
        else:
            c["verdict"], c["why"] = "allowed", "within the limits"
    allowed = [c for c in candidates if c["verdict"] == "allowed" and not _is_dense(c)]
    dense = next(c for c in candidates if _is_dense(c))
    best = max(allowed, key=lambda c: c["prefill_speedup"], default=dense)
    best["verdict"] = "chosen"
    if best is dense:
        best["why"] = "nothing faster stays within the limits"
        return best["name"], "No candidate was faster than dense attention within the allowed loss."
    best["why"] = "the fastest prefill within the limits"
    return best["name"], (
        f"{best['name']} has the fastest prefill ({best['prefill_speedup']:.2f}× dense) among the candidates that raise perplexity by at most {limit:.1%}."
    )


def _is_dense(candidate: dict[str, Any]) -> bool:
    return candidate["name"] == "dense"
