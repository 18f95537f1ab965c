"""The figures of a run, computed from its journal: nothing here measures, nothing is kept but what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..policies.policy import Policy
from .candidates import DENSE, Candidate
from .journal import Journal
from .verdict import increase, middle, perplexity, ratios

NEEDLE_DEPTHS = (0.1, 0.5, 0.9)
INFORMATIVE = 0.5
"""Needle scores say something only when the dense model finds at least this share."""
BASELINE = "sdpa"
KINDS = ("quality", "decoding", "timing")


def runs(journal: Journal, kind: str, name: str) -> list[dict[str, Any]]:
    """All journal entries of one kind for a candidate, or for the baseline."""
    if name == BASELINE:
        return [journal[k] for k in journal if k.startswith(f"{kind}.{BASELINE}.")]
    key = f"{kind}.{name}"
    return [journal[key]] if key in journal else []


def figures(journal: Journal, candidates: Sequence[Candidate]) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    """Candidate rows, baseline, and whether needle scores are informative."""
    dense = {kind: runs(journal, kind, BASELINE) for kind in KINDS}
    full = [r["prefill"] for kind in ("quality", "timing") for r in dense[kind]]
    quality, decoding = dense["quality"][0], dense["decoding"][0]
    score = sum(decoding["hits"]) / len(decoding["hits"])
    baseline = {
        "name": BASELINE,
        "prefill_s": middle(full),
        "prefill_samples": full,
        "decode_tok_s": 1.0 / middle([r["step"] for r in dense["decoding"]]),
        "peak_mb": middle([r["peak_mb"] for r in dense["decoding"]]),
        "ppl": perplexity(quality["nll"]),
        "decode_ppl": perplexity(decoding["nll"]),
        "needle": score,
        "needle_hits": _hits(decoding["hits"]),
    }
    informative = score >= INFORMATIVE
    rows = [_row(journal, c, dense, baseline, informative) for c in candidates]
    return [_dense_row(baseline, informative), *rows], baseline, informative


def _dense_row(baseline: dict[str, Any], informative: bool) -> dict[str, Any]:
    """The model's own attention as a candidate: every ratio is that of the baseline to itself."""
    same = dict.fromkeys(("ppl_increase", "decode_ppl_increase", "kl"), 0.0)
    ones = dict.fromkeys(
        ("density", "tile_density", "decode_density", "prefill_speedup", "decode_speedup", "peak_ratio"), 1.0
    )
    return {
        "name": DENSE.name, "kind": DENSE.kind, "method": DENSE.method, "policy": DENSE.policy.to_json(), "look_ahead": "none", **ones, **same,
        "ppl": baseline["ppl"], "decode_ppl": baseline["decode_ppl"], "needle": baseline["needle"] if informative else "uninformative",
        "needle_hits": baseline["needle_hits"],
    }  # fmt: skip


def _row(
    journal: Journal,
    candidate: Candidate,
    dense: dict[str, list[dict[str, Any]]],
    baseline: dict[str, Any],
    informative: bool,
) -> dict[str, Any]:
    own = {kind: runs(journal, kind, candidate.name) for kind in KINDS}
    speed = [r for kind in KINDS for r in ratios(dense[kind], own[kind], "prefill")]
    quality, decoding = own["quality"][0], own["decoding"][0]
    rise, rise_span = increase(quality["nll"], dense["quality"][0]["nll"])
    late, late_span = increase(decoding["nll"], dense["decoding"][0]["nll"])
    tail = len(decoding["nll"])
    gap, gap_span = increase(decoding["nll"], quality["nll"][-tail:])  # the same tokens, cached against teacher-forced
    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "method": candidate.method,
        "policy": candidate.policy.to_json(),
        "look_ahead": _look_ahead(candidate.policy),
        "density": quality["density"],
        "tile_density": quality["tile_density"],
        "decode_density": decoding["density"],
        "prefill_speedup": middle(speed),
        "prefill_speedup_range": [min(speed, default=1.0), max(speed, default=1.0)],
        "decode_speedup": middle(ratios(dense["decoding"], own["decoding"], "step")),
        "peak_ratio": decoding["peak_mb"] / baseline["peak_mb"] if baseline["peak_mb"] else None,
        "ppl": perplexity(quality["nll"]),
        "ppl_increase": rise,
        "ppl_increase_interval": rise_span,
        "tail_ppl": perplexity(quality["nll"][-tail:]),
        "decode_ppl": perplexity(decoding["nll"]),
        "decode_ppl_increase": late,
        "decode_ppl_increase_interval": late_span,
        "decode_gap": gap,
        "decode_gap_interval": gap_span,
        "kl": quality["kl"],
        "needle": sum(decoding["hits"]) / len(decoding["hits"]) if informative else "uninformative",
        "needle_hits": _hits(decoding["hits"]),
    }


def _hits(hits: list[bool]) -> list[list[Any]]:
    return [[depth, hit] for depth, hit in zip(NEEDLE_DEPTHS, hits, strict=True)]


def _look_ahead(policy: Policy) -> str:
    order = ("none", "block", "prefill")
    rules = [policy.default, *(rule for _, rule in policy.layers)]
    return max((rule.prefill.look_ahead for rule in rules), key=order.index)
