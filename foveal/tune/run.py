"""``foveal tune``: profile → propose → measure → search → choose → report."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError
from ..core.provenance import provenance
from ..data import needle, text
from ..hf.load import LoadedModel, load_model
from ..lens.model import profile_model
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..policies.policy import ModelStamp, Policy
from .candidates import Candidate, patterns, uniform
from .journal import Journal, write_whole
from .meter import DenseLogits, Meter
from .options import TuneOptions
from .search import Found, search
from .verdict import increase, judge, middle, perplexity, ratios

NEEDLE_DEPTHS = (0.1, 0.5, 0.9)
INFORMATIVE = 0.5
"""Needle scores say something only when the dense model finds at least this share."""
FINALISTS = 4
"""Allowed candidates that get further timed prefills."""
BASELINE = "sdpa"

Report = Callable[[str, int, int], None]
"""``report(what, done, total)``, called whenever a unit of work ends."""


@dataclass
class _Work:
    """Everything one run holds on to."""

    options: TuneOptions
    loaded: LoadedModel
    meter: Meter
    journal: Journal
    search_ids: Tensor
    held_out: Tensor
    needles: needle.Needles
    text_info: dict[str, Any]
    report: Report
    done: int = 0
    total: int = 0

    def tick(self, what: str, weight: int = 1) -> None:
        self.done += weight
        self.report(what, min(self.done, self.total), self.total)


def run_tune(
    options: TuneOptions, report: Report | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Measure, search and choose; write ``results.json``, ``policy.json`` and ``report.html`` into ``options.out``.

    Args:
        options: what to do.
        report: progress callback.
        say: called with a line before a step that has no units (loading).

    Returns:
        The results, as written to ``results.json``.

    Raises:
        FovealError: with one clear message; what was measured stays in the journal and the next run goes on from there.
    """
    work = _prepare(options, report or (lambda *_: None), say or (lambda _: None))
    proposed = uniform(options.context)
    layers = _layers(work)
    work.total = 3 * (len(proposed) + 3) + FINALISTS + (2 * layers + 4 if options.search else 0) + 1
    profile = _profile(work)
    _measure(work, proposed)
    found: Found | None = None
    if options.search:
        tried = [p for _, p in patterns(options.context)]
        found, policy = search(work.meter, work.search_ids, tried, options.max_ppl_increase, work.journal, _decode_rule(work, proposed), work.tick)  # fmt: skip
        proposed = [*proposed, Candidate(f"per layer, {options.max_ppl_increase:g}", policy, "per-layer")]
        _measure(work, proposed[-1:])
    rows, baseline, informative = _figures(work, proposed)
    judge(rows, baseline, options.max_ppl_increase, informative)
    _again(work, proposed, rows)
    rows, baseline, informative = _figures(work, proposed)
    chosen, why = judge(rows, baseline, options.max_ppl_increase, informative)
    results = _results(work, rows, baseline, informative, chosen, why, profile, found)
    _write(work, results, next(c for c in proposed if c.name == chosen))
    return results


def _prepare(options: TuneOptions, report: Report, say: Callable[[str], None]) -> _Work:
    content = text.load_text(options.text)
    journal_path = options.folder / "journal.jsonl"
    loaded = load_model(options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code, progress=say)  # fmt: skip
    limit = loaded.context_limit
    if limit is not None and options.context > limit:
        raise ConfigError(
            f"context is {options.context}, but {loaded.name} was made for at most {limit} tokens; pass --context {limit} or less."
        )
    if hasattr(loaded.model, "set_attn_implementation") and loaded.model.config._attn_implementation != BASELINE:
        loaded.model.set_attn_implementation(BASELINE)
    ids = text.tokens(loaded.tokenizer, content)
    ahead = text.prefix(loaded.tokenizer)
    spans = text.split(ids, options.context, seed=options.seed, ahead=ahead)
    needles = needle.build(loaded.tokenizer, ids, options.context, depths=NEEDLE_DEPTHS, seed=options.seed)
    digest = hashlib.sha256(content.encode()).hexdigest()
    info = {"name": text.text_name(options.text), "sha256": digest, "tokens": len(ids)}
    journal = Journal(journal_path, options.digest(model_sha=loaded.fingerprint, text_sha=digest))
    return _Work(
        options, loaded, Meter(loaded.model, options.impl), journal, spans.search, spans.held_out, needles, info, report
    )


def _layers(work: _Work) -> int:
    from ..hf.families import depth, sites

    return depth(work.loaded.model, sites(work.loaded.model))


def _profile(work: _Work) -> dict[str, Any]:
    """Step 2: what every head does on the search text."""
    if "profile" not in work.journal:
        got = profile_model(
            work.loaded.model, work.search_ids, window=min(128, work.options.context // 8), seed=work.options.seed
        )
        work.journal.put("profile", {"json": got.to_json()})
    work.tick("profiled every head")
    profile: dict[str, Any] = work.journal["profile"]["json"]
    return profile


# --- step 3: measure ---------------------------------------------------------------------------------------------------


def _measure(work: _Work, candidates: list[Candidate]) -> None:
    """Quality, decoding and retrieval of each candidate, in rounds that begin and end with the model's own attention."""
    _round(work, "quality", candidates, _quality_unit(work))
    _round(work, "decoding", candidates, _decoding_unit(work))
    _round(work, "retrieval", candidates, _retrieval_unit(work))


Unit = Callable[[Candidate | None], dict[str, Any]]


def _round(work: _Work, kind: str, candidates: list[Candidate], unit: Unit) -> None:
    missing = [c for c in candidates if f"{kind}.{c.name}" not in work.journal]
    number = sum(k.startswith(f"{kind}.{BASELINE}.") for k in work.journal)
    if missing:
        _baseline(work, kind, number, unit)
    for candidate in candidates:
        if candidate in missing:
            work.journal.put(f"{kind}.{candidate.name}", {**unit(candidate), "round": f"{kind}.{number}"})
        work.tick(f"{kind}: {candidate.name}")
    if missing and kind != "retrieval":
        _baseline(work, kind, number, unit, after=True)


def _baseline(work: _Work, kind: str, number: int, unit: Unit, after: bool = False) -> None:
    key = f"{kind}.{BASELINE}.{number}{'b' if after else 'a'}"
    work.journal.put(key, {**unit(None), "round": f"{kind}.{number}"})
    work.report(f"{kind}: {BASELINE}", work.done, work.total)


def _quality_unit(work: _Work) -> Unit:
    reference = DenseLogits()

    def unit(candidate: Candidate | None) -> dict[str, Any]:
        name = candidate.name if candidate else "the dense model"
        got = work.meter.quality(work.held_out, candidate.policy if candidate else None, reference, name)
        return {
            "prefill": got.seconds, "nll": _short(got.nll), "kl": got.kl, "density": got.density.density,
            "tile_density": got.density.tile_density,
        }  # fmt: skip

    return unit


def _decoding_unit(work: _Work) -> Unit:
    def unit(candidate: Candidate | None) -> dict[str, Any]:
        name = candidate.name if candidate else "the dense model"
        got = work.meter.decoding(
            work.held_out, work.options.decode_tokens, candidate.policy if candidate else None, name
        )
        return {
            "prefill": got.prefill_seconds, "step": got.step_seconds, "nll": _short(got.nll), "peak_mb": got.peak_mb,
            "density": got.density.density,
        }  # fmt: skip

    return unit


def _retrieval_unit(work: _Work) -> Unit:
    def unit(candidate: Candidate | None) -> dict[str, Any]:
        seconds, hits = work.meter.retrieval(work.needles, candidate.policy if candidate else None)
        return {"prefill": seconds, "hits": list(hits)}

    return unit


def _again(work: _Work, candidates: list[Candidate], rows: list[dict[str, Any]]) -> None:
    """Time the prefill of the best candidates once more, beside the model's own attention."""
    good = sorted((r for r in rows if r["verdict"] in ("allowed", "chosen")), key=lambda r: -r["prefill_speedup"])[
        :FINALISTS
    ]
    names = [r["name"] for r in good]
    finalists = [c for c in candidates if c.name in names]

    def unit(candidate: Candidate | None) -> dict[str, Any]:
        return {"prefill": work.meter.prefill(work.held_out, candidate.policy if candidate else None)}

    _round(work, "timing", finalists, unit)


def _short(nll: Tensor) -> list[float]:
    return [round(x, 6) for x in nll.double().tolist()]


def _decode_rule(work: _Work, proposed: list[Candidate]) -> Callable[[Pattern], Pattern | None]:
    """Decode with the prefill's pattern where that was measured to be faster than dense decoding, else densely."""
    faster: dict[Pattern, bool] = {}
    for candidate in proposed:
        pattern = candidate.policy.default.prefill
        dense, own = _runs(work, "decoding", BASELINE), [work.journal[f"decoding.{candidate.name}"]]
        faster[pattern] = middle(ratios(dense, own, "step")) > 1.0

    def rule(pattern: Pattern) -> Pattern | None:
        return None if faster.get(pattern, False) else Dense()

    return rule


def _runs(work: _Work, kind: str, name: str) -> list[dict[str, Any]]:
    """All journal entries of one kind for a candidate, or for the baseline."""
    if name == BASELINE:
        return [work.journal[k] for k in work.journal if k.startswith(f"{kind}.{BASELINE}.")]
    key = f"{kind}.{name}"
    return [work.journal[key]] if key in work.journal else []


# --- figures -----------------------------------------------------------------------------------------------------------


def _figures(work: _Work, candidates: list[Candidate]) -> tuple[list[dict[str, Any]], dict[str, Any], bool]:
    kinds = ("quality", "decoding", "retrieval", "timing")
    dense = {kind: _runs(work, kind, BASELINE) for kind in kinds}
    full = [r["prefill"] for kind in ("quality", "timing") for r in dense[kind]]
    quality, decoding, retrieval = dense["quality"][0], dense["decoding"][0], dense["retrieval"][0]
    score = sum(retrieval["hits"]) / len(retrieval["hits"])
    baseline = {
        "name": BASELINE,
        "prefill_s": middle(full),
        "prefill_samples": full,
        "decode_tok_s": 1.0 / middle([r["step"] for r in dense["decoding"]]),
        "peak_mb": middle([r["peak_mb"] for r in dense["decoding"]]),
        "ppl": perplexity(quality["nll"]),
        "decode_ppl": perplexity(decoding["nll"]),
        "needle": score,
        "needle_hits": _hits(retrieval["hits"]),
    }
    informative = score >= INFORMATIVE
    rows = [_row(work, c, dense, kinds, baseline, informative) for c in candidates]
    return rows, baseline, informative


def _row(work: _Work, candidate: Candidate, dense: dict[str, list[dict[str, Any]]], kinds: tuple[str, ...], baseline: dict[str, Any], informative: bool) -> dict[str, Any]:  # fmt: skip
    own = {kind: _runs(work, kind, candidate.name) for kind in kinds}
    speed = [r for kind in kinds for r in ratios(dense[kind], own[kind], "prefill")]
    quality, decoding, retrieval = own["quality"][0], own["decoding"][0], own["retrieval"][0]
    rise, rise_span = increase(quality["nll"], dense["quality"][0]["nll"])
    late, late_span = increase(decoding["nll"], dense["decoding"][0]["nll"])
    tail = len(decoding["nll"])
    return {
        "name": candidate.name,
        "kind": candidate.kind,
        "policy": candidate.policy.to_json(),
        "look_ahead": _look_ahead(candidate.policy),
        "density": quality["density"],
        "tile_density": quality["tile_density"],
        "decode_density": decoding["density"],
        "prefill_speedup": middle(speed),
        "prefill_speedup_range": [min(speed, default=1.0), max(speed, default=1.0)],
        "decode_speedup": middle(ratios(dense["decoding"], own["decoding"], "step")),
        "peak_ratio": decoding["peak_mb"] / baseline["peak_mb"] if baseline["peak_mb"] else math.nan,
        "ppl": perplexity(quality["nll"]),
        "ppl_increase": rise,
        "ppl_increase_interval": rise_span,
        "tail_ppl": perplexity(quality["nll"][-tail:]),
        "tail_ppl_increase": increase(quality["nll"][-tail:], dense["quality"][0]["nll"][-tail:])[0],
        "decode_ppl": perplexity(decoding["nll"]),
        "decode_ppl_increase": late,
        "decode_ppl_increase_interval": late_span,
        "kl": quality["kl"],
        "needle": sum(retrieval["hits"]) / len(retrieval["hits"]) if informative else "uninformative",
        "needle_hits": _hits(retrieval["hits"]),
    }


def _hits(hits: list[bool]) -> list[list[Any]]:
    return [[depth, hit] for depth, hit in zip(NEEDLE_DEPTHS, hits, strict=True)]


def _look_ahead(policy: Policy) -> str:
    order = ("none", "block", "prefill")
    rules = [policy.default, *(rule for _, rule in policy.layers)]
    return max((rule.prefill.look_ahead for rule in rules), key=order.index)


# --- results -----------------------------------------------------------------------------------------------------------


def _results(work: _Work, rows: list[dict[str, Any]], baseline: dict[str, Any], informative: bool, chosen: str, why: str, profile: dict[str, Any], found: Found | None) -> dict[str, Any]:  # fmt: skip
    options, model = work.options, work.loaded.model
    config = model.config.get_text_config()
    where = provenance()
    return {
        "foveal_results": 1,
        "model": work.loaded.name,
        "model_info": {
            "architecture": type(model).__name__, "source": work.loaded.source, "fingerprint": work.loaded.fingerprint,
            "layers": _layers(work), "heads": getattr(config, "num_attention_heads", None),
            "kv_heads": getattr(config, "num_key_value_heads", None), "head_dim": getattr(config, "head_dim", None),
            "parameters": sum(p.numel() for p in model.parameters()),
        },
        "context": options.context,
        "dtype": work.loaded.dtype,
        "impl": options.impl,
        "seed": options.seed,
        "max_ppl_increase": options.max_ppl_increase,
        "text": work.text_info,
        "scored_tokens": work.meter.scored(options.context),
        "decode_tokens": options.decode_tokens,
        "machine": where.get("machine", {}),
        "provenance": where,
        "baseline": baseline,
        "needle_informative": informative,
        "candidates": rows,
        "chosen": chosen,
        "why": why,
        "profile": profile,
        "search": found.to_json() if found is not None else None,
        "settings": {k: v for k, v in asdict(options).items() if k not in ("out", "text")},
    }  # fmt: skip


def _write(work: _Work, results: dict[str, Any], chosen: Candidate) -> None:
    from .report import write_report

    stamp = ModelStamp(type(work.loaded.model).__name__, _layers(work), work.loaded.fingerprint)
    context = work.options.context
    policy = replace(chosen.policy, name=chosen.name, model=stamp, dtype=work.loaded.dtype, context=(context, context))
    folder: Path = work.options.folder
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(folder / "policy.json", json.dumps(policy.to_json(), indent=2) + "\n")
    write_report(results, folder / "report.html")
    work.tick("wrote the report")
