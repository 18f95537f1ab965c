"""The report of ``foveal tune``: one HTML file that needs nothing else, from the dictionary of ``results.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import DataError, UnsupportedError
from .heat import DARK, LIGHT, profile_heats, ramp, search_heats
from .methods import as_candidates
from .plots import KINDS, pareto, pareto_png
from .table import GAP, MISSING, decode_gap, figure, finite, interval, needle, ordered, percent, small, table

VERSION = 1
_NEEDED = ("model", "context", "dtype", "baseline", "candidates", "chosen")


def write_report(results: Mapping[str, Any], path: str | Path) -> None:
    """Write the report; the file appears whole or not at all.

    Args:
        results: the dictionary of ``results.json``. Without ``profile`` or ``search`` their sections are left out.
        path: of the HTML file.

    Raises:
        DataError: ``results`` lacks a field or has another version, or the file cannot be written.
        UnsupportedError: jinja2 is not installed.
    """
    path = Path(path)
    html = render(results)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise DataError(
            f"the report {path} cannot be written: {error}. Choose another folder with --out, or free some space."
        ) from None


def render(results: Mapping[str, Any]) -> str:
    """The report as a string of HTML; raises as :func:`write_report` does."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise UnsupportedError("reports need jinja2: pip install 'foveal[report]'.") from error
    chosen = _checked(results)
    environment = Environment(
        loader=PackageLoader("foveal.tune"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        figure=figure, percent=percent, finite=finite, interval=interval, needle=needle, decode_gap=decode_gap
    )
    environment.globals.update(small=small, GAP=GAP, MISSING=MISSING, KINDS=KINDS)
    return environment.get_template("report.html.j2").render(
        r=results,
        chosen=chosen,
        headline=headline(results),
        candidates=ordered(results),
        methods=_both(shown, "prefill") if (shown := as_candidates(results)) else None,
        plots=[p for what in ("prefill", "decode") if (p := _both(results, what))],
        policy_rows=policy_rows(chosen.get("policy") or {}, (results.get("model_info") or {}).get("layers")),
        policy_json=json.dumps(chosen.get("policy"), indent=2, ensure_ascii=False),
        search_heats=search_heats(results.get("search")),
        rounds=(results.get("search") or {}).get("rounds") or [],
        profile_heats=profile_heats(results.get("profile")),
        samples=[v for v in map(finite, results["baseline"].get("prefill_samples") or []) if v is not None],
        facts=facts(results),
        light=ramp(LIGHT),
        dark=ramp(DARK),
    )


def _checked(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The chosen candidate."""
    version = results.get("foveal_results", VERSION)
    if version != VERSION:
        raise DataError(
            f"results.foveal_results is {version!r}; this foveal reads version {VERSION}. Run `foveal tune` again."
        )
    for name in _NEEDED:
        if name not in results:
            raise DataError(
                f"results lacks the field {name!r}; expected what `foveal tune` writes to results.json. Run it again."
            )
    names = [c["name"] for c in results["candidates"]]
    if results["chosen"] not in names:
        raise DataError(
            f"results.chosen is {results['chosen']!r}; expected the name of a candidate: {', '.join(names)}. Run `foveal tune` again."
        )
    return next(c for c in results["candidates"] if c["name"] == results["chosen"])


def _both(results: Mapping[str, Any], what: Any) -> dict[str, Any] | None:
    """A plot for wide and one for narrow screens."""
    wide, narrow = pareto(results, what), pareto(results, what, 400, 430)
    return None if wide is None or narrow is None else {"title": what, "wide": wide, "narrow": narrow}


def headline(results: Mapping[str, Any]) -> str:
    """The answer in one sentence."""
    chosen = _checked(results)
    speed, context = finite(chosen.get("prefill_speedup")), f"{results['context']} tokens"
    if chosen["name"] == "dense":
        limit = results.get("max_ppl_increase")
        within = f" within {percent(limit)} perplexity" if finite(limit) is not None else ""
        return f"Keep dense attention: no candidate was faster{within} at {context}."
    name = chosen["name"]
    if chosen.get("kind") == "per-layer":
        only = sum(c.get("kind") == "per-layer" for c in results["candidates"]) == 1
        name = "the per-layer policy" if only else f"the per-layer policy “{name}”"
    if speed is None:
        gain = "prefill time not measured"
    else:
        gain = (
            f"{figure(speed, '.2f')}× faster prefill"
            if speed > 1
            else f"{figure(speed, '.2f')}× the prefill speed of dense"
        )
    return f"Use {name}: {gain} at {context}, perplexity {percent(chosen.get('ppl_increase'))}."


def pattern_text(pattern: Any) -> str:
    """A pattern's JSON as "name(field=value, …)"."""
    if isinstance(pattern, Mapping):
        fields = ", ".join(f"{k}={pattern_text(v)}" for k, v in pattern.items() if k != "pattern")
        name = str(pattern.get("pattern", ""))
        return f"{name}({fields})" if name and fields else name or fields.replace("=", " ", 1)
    if isinstance(pattern, Sequence) and not isinstance(pattern, str):
        return "[" + ", ".join(pattern_text(p) for p in pattern) + "]"
    return f"{pattern:g}" if isinstance(pattern, float) else str(pattern)


def policy_rows(policy: Mapping[str, Any], layers: int | None) -> list[tuple[str, str, str, str]]:
    """``(layers, heads, prefill, decode)`` of every rule, layers with the same rule in one row.

    Args:
        policy: JSON of a :class:`foveal.policies.Policy`.
        layers: number of layers of the model, or None when unknown.
    """
    named: dict[int, Mapping[str, Any]] = {}
    for span, rule in (policy.get("layers") or {}).items():
        first, _, last = span.partition("-")
        named.update(dict.fromkeys(range(int(first), int(last or first) + 1), rule))
    rest = [i for i in range(layers or 0) if i not in named]
    groups: list[tuple[Mapping[str, Any], list[int]]] = []
    for layer, rule in sorted(named.items()):
        for known, members in groups:
            if known == rule:
                members.append(layer)
                break
        else:
            groups.append((rule, [layer]))
    default = policy.get("default")
    rows: list[tuple[str, str, str, str]] = []
    for rule, members in groups:
        rows += _rule_rows(rule, _spans(members))
    if default is not None and (rest or not layers):
        rows += _rule_rows(default, _spans(rest) if named and layers else "all other" if named else "all")
    return rows


def _rule_rows(rule: Mapping[str, Any], where: str) -> list[tuple[str, str, str, str]]:
    if "pattern" in rule:
        return [(where, "all", pattern_text(rule), "as prefill")]
    heads = rule.get("heads") or {}
    decode = rule.get("decode")
    prefill = pattern_text(rule.get("prefill") or {"pattern": "dense"})
    rows = [(where, "all other" if heads else "all", prefill, "as prefill" if decode is None else pattern_text(decode))]
    for span, inner in heads.items():
        rows += [(where, str(span).replace("-", "–"), *row[2:]) for row in _rule_rows(inner, where)]
    return rows


def _spans(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def facts(results: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Provenance as ``(group, [(name, value)])``."""
    provenance = {
        k: v for k, v in (results.get("provenance") or {}).items() if k != "machine" or not results.get("machine")
    }
    run = {
        k: results[k]
        for k in ("context", "dtype", "impl", "seed", "max_ppl_increase", "scored_tokens", "decode_tokens")
        if k in results
    }
    groups = [
        ("Model", {"name": results["model"], **(results.get("model_info") or {})}),
        ("Text", results.get("text") or {}),
        ("Run", {**run, **{k: v for k, v in (results.get("settings") or {}).items() if k not in run}}),
        ("Machine", results.get("machine") or {}),
        ("Software", provenance),
    ]
    return [(name, _flat(values)) for name, values in groups if values]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}: ")
        elif isinstance(value, Sequence) and not isinstance(value, str):
            rows.append((name, ", ".join(map(str, value))))
        else:
            rows.append(
                (
                    name,
                    f"{value:,}"
                    if type(value) is int and value >= 100_000
                    else MISSING
                    if value is None
                    else str(value),
                )
            )
    return rows


__all__ = ["headline", "pareto_png", "render", "table", "write_report"]
