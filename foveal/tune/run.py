"""``foveal tune``: profile → propose → measure → search → choose → report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.errors import ConfigError
from ..core.provenance import provenance
from ..data import needle, text
from ..hf.families import depth, sites
from ..hf.load import LoadedModel, load_model
from ..lens.model import profile_model
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..policies.policy import ModelStamp
from .candidates import DENSE, Candidate, dense_by, further, layer_options, uniform
from .figures import BASELINE, NEEDLE_DEPTHS, figures, runs
from .hylra import hylra_candidates
from .journal import Journal, write_whole
from .meter import DenseLogits, Meter
from .methods import beside_policy, flux_candidate, side_by_side
from .options import TuneOptions
from .search import search
from .verdict import judge, middle, ratios

FINALISTS = 2
"""Allowed candidates that get further timed prefills."""

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
    needles: needle.Needles
    text_info: dict[str, Any]
    report: Report
    reference: DenseLogits = field(default_factory=DenseLogits)
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
    kernel = work.meter.dense_kernel(options.context)
    proposed = [*([] if kernel == BASELINE else [dense_by(kernel)]), *uniform(options.context)]
    proposed += further(options.patterns, options.context)
    routed = [flux_candidate(options.router, work.loaded.fingerprint, _layers(work))] if options.router else []
    layers, texts = _layers(work), len(work.search_ids)
    steps = {"greedy": (texts + 1) * layers + 4, "hylra": layers + 4, "flux": 2}
    work.total = 2 * (len(proposed) + 1) + FINALISTS + 2 + sum(steps[name] for name in options.methods)
    profile = _profile(work)
    _measure(work, proposed)
    searched: dict[str, Any] = {"search": None, "hylra": None}
    for name in options.methods:
        more, said = (routed, {}) if name == "flux" else _search(work, name, proposed)
        searched |= said
        proposed = [*proposed, *more]
        _measure(work, more)
    rows, baseline, informative = figures(work.journal, proposed)
    judge(rows, baseline, options.max_ppl_increase, informative)
    _again(work, proposed, rows)
    rows, baseline, informative = figures(work.journal, proposed)
    chosen, why = judge(rows, baseline, options.max_ppl_increase, informative)
    results = _results(work, rows, baseline, informative, chosen, why, profile, searched)
    _write(work, results, next(c for c in (DENSE, *proposed) if c.name == chosen))
    return results


def _search(work: _Work, method: str, proposed: list[Candidate]) -> tuple[list[Candidate], dict[str, Any]]:
    """Candidates that a method found, and what the results keep of how."""
    if method == "hylra":
        more, planned = hylra_candidates(work.meter, work.search_ids[:1], work.journal, work.tick)
        return more, {"hylra": planned}
    options, rule = work.options, _decode_rule(work, proposed)
    found, policy = search(
        work.meter,
        work.search_ids,
        layer_options(options.context),
        options.max_ppl_increase,
        work.journal,
        rule,
        work.tick,
    )
    # a search that came back to dense adds nothing: dense is a candidate already
    more = [Candidate("per layer", policy, "per-layer", "greedy")] if any(found.picked) else []
    return more, {"search": found.to_json()}


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
    pieces = len(ids) // max(1, options.context - len(ahead))
    texts = min(options.search_texts, max(1, pieces - 1))
    spans = text.split(ids, options.context, search=texts, seed=options.seed, ahead=ahead)
    needles = needle.build(
        loaded.tokenizer, spans.held_out[0], options.context, depths=NEEDLE_DEPTHS, seed=options.seed
    )
    digest = hashlib.sha256(content.encode()).hexdigest()
    info = {"name": text.text_name(options.text), "sha256": digest, "tokens": len(ids)}
    journal = Journal(journal_path, options.digest(model_sha=loaded.fingerprint, text_sha=digest))
    return _Work(options, loaded, Meter(loaded.model, options.impl), journal, spans.search, needles, info, report)


def _layers(work: _Work) -> int:
    return depth(work.loaded.model, sites(work.loaded.model))


def _profile(work: _Work) -> dict[str, Any]:
    """Step 2: what every head does on the search text."""
    if "profile" not in work.journal:
        got = profile_model(
            work.loaded.model, work.search_ids[:1], window=min(128, work.options.context // 8), seed=work.options.seed
        )
        work.journal.put("profile", {"json": got.to_json()})
    work.tick("profiled every head")
    profile: dict[str, Any] = work.journal["profile"]["json"]
    return profile


# --- step 3: measure ---------------------------------------------------------------------------------------------------


def _measure(work: _Work, candidates: list[Candidate]) -> None:
    """Quality, then decoding and retrieval, of each candidate, after the model's own attention in the same session."""
    _round(work, "quality", candidates, _quality_unit(work))
    _round(work, "decoding", candidates, _decoding_unit(work))


Unit = Callable[[Candidate | None], dict[str, Any]]


def _round(work: _Work, kind: str, candidates: list[Candidate], unit: Unit, again: bool = False) -> None:
    missing = [c for c in candidates if f"{kind}.{c.name}" not in work.journal]
    if missing and (again or not _baseline_here(work, kind)):
        _baseline(work, kind, unit)
    for candidate in candidates:
        if candidate in missing:
            work.journal.put(f"{kind}.{candidate.name}", unit(candidate))
        work.tick(f"{kind}: {candidate.name}")
    if missing and again:
        _baseline(work, kind, unit)


def _baseline_here(work: _Work, kind: str) -> bool:
    return any(run["session"] == work.journal.session for run in runs(work.journal, kind, BASELINE))


def _baseline(work: _Work, kind: str, unit: Unit) -> None:
    number = len(runs(work.journal, kind, BASELINE))
    work.journal.put(f"{kind}.{BASELINE}.{number}", unit(None))
    work.report(f"{kind}: {BASELINE}", min(work.done, work.total), work.total)


def _quality_unit(work: _Work) -> Unit:
    def unit(candidate: Candidate | None) -> dict[str, Any]:
        name = candidate.name if candidate else "the dense model"
        got = work.meter.quality(
            work.needles.context[None], candidate.policy if candidate else None, work.reference, name
        )
        return {
            "prefill": got.seconds, "nll": _short(got.nll), "kl": got.kl, "density": got.density.density,
            "tile_density": got.density.tile_density,
        }  # fmt: skip

    return unit


def _decoding_unit(work: _Work) -> Unit:
    def unit(candidate: Candidate | None) -> dict[str, Any]:
        name = candidate.name if candidate else "the dense model"
        got = work.meter.decoding(
            work.needles, work.options.decode_tokens, candidate.policy if candidate else None, name
        )
        return {
            "prefill": got.prefill_seconds, "step": got.step_seconds, "nll": _short(got.nll), "peak_mb": got.peak_mb,
            "hits": list(got.hits),
            "density": got.density.density,
        }  # fmt: skip

    return unit


def _again(work: _Work, candidates: list[Candidate], rows: list[dict[str, Any]]) -> None:
    """Time the prefill of the best candidates once more, beside the model's own attention."""
    good = sorted((r for r in rows if r["verdict"] in ("allowed", "chosen")), key=lambda r: -r["prefill_speedup"])[
        :FINALISTS
    ]
    names = [r["name"] for r in good]
    finalists = [c for c in candidates if c.name in names]

    def unit(candidate: Candidate | None) -> dict[str, Any]:
        return {"prefill": work.meter.prefill(work.needles.context[None], candidate.policy if candidate else None)}

    _round(work, "timing", finalists, unit, again=True)


def _short(nll: Tensor) -> list[float]:
    return [round(x, 6) for x in nll.double().tolist()]


def _decode_rule(work: _Work, proposed: list[Candidate]) -> Callable[[Pattern], Pattern | None]:
    """Decode with the prefill's pattern where that was measured to be faster than dense decoding, else densely."""
    faster: dict[Pattern, bool] = {}
    for candidate in proposed:
        pattern = candidate.policy.default.prefill
        dense, own = runs(work.journal, "decoding", BASELINE), [work.journal[f"decoding.{candidate.name}"]]
        faster[pattern] = middle(ratios(dense, own, "step")) > 1.0

    def rule(pattern: Pattern) -> Pattern | None:
        return None if faster.get(pattern, False) else Dense()

    return rule


# --- results -----------------------------------------------------------------------------------------------------------


def _results(work: _Work, rows: list[dict[str, Any]], baseline: dict[str, Any], informative: bool, chosen: str, why: str, profile: dict[str, Any], searched: dict[str, Any]) -> dict[str, Any]:  # fmt: skip
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
        "scored_tokens": work.meter.scored(len(work.needles.context)),
        "decode_tokens": options.decode_tokens,
        "machine": where.get("machine", {}),
        "provenance": where,
        "baseline": baseline,
        "needle_informative": informative,
        "candidates": rows,
        "chosen": chosen,
        "why": why,
        "profile": profile,
        **searched,
        "methods": side_by_side(rows, options.methods, options.max_ppl_increase),
        "settings": {k: v for k, v in asdict(options).items() if k not in ("out", "text")},
    }  # fmt: skip


def _write(work: _Work, results: dict[str, Any], chosen: Candidate) -> None:
    from .report import write_report

    stamp = ModelStamp(type(work.loaded.model).__name__, _layers(work), work.loaded.fingerprint)
    context = work.options.context
    policy = replace(chosen.policy, name=chosen.name, model=stamp, dtype=work.loaded.dtype, context=(context, context))
    folder: Path = work.options.folder
    policy = beside_policy(policy, folder)
    write_whole(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_whole(folder / "policy.json", json.dumps(policy.to_json(), indent=2) + "\n")
    write_report(results, folder / "report.html")
    work.tick("wrote the report")
