"""The printed table of ``foveal tune``, and how its figures are written.

The functions here read the dictionary of ``results.json``. Increases and intervals are fractions (0.01 is 1 %); speed-ups
and memory are ratios to the baseline, transformers' own attention; a figure that was not measured is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

MISSING = "–"
"""Stands for a figure that was not measured."""

GAP = "†"
"""Marks a decode figure that disagrees with the teacher-forced one by more than their intervals."""

ORDER = ("chosen", "allowed", "slower than dense", "over the loss limit")
"""Verdicts, best first."""

_SHORT = {"slower than dense": "slower", "over the loss limit": "over limit"}
_STYLE = {"chosen": "bold green", "allowed": "", "slower than dense": "dim", "over the loss limit": "dim"}


def finite(value: Any) -> float | None:
    """``value`` as a float, or None when it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def figure(value: Any, spec: str = ".3f", unit: str = "", factor: float = 1.0) -> str:
    """``factor · value`` in the given format, with a true minus sign; "–" for None, and NaN and ∞ by name."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return MISSING
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = format(factor * value, spec).replace("-", "−")
    if text.lstrip("+−").strip("0.") == "":
        text = text.lstrip("+−")  # no sign on what rounds to zero
    return text + unit


def small(value: Any) -> str:
    """A figure that may be tiny: 0.00612, 8.3e−5."""
    size = abs(finite(value) or 0.0)
    if 0 < size < 1e-4:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    return figure(value, ".3g" if size < 100 else ",.0f")


def percent(value: Any, unit: str = " %") -> str:
    """An increase with its sign: 0.004 is "+0.40 %", 3.2 is "+320 %"; fewer decimals where they say nothing."""
    size = 100 * abs(finite(value) or 0.0)
    spec = "+.2f" if size < 9.995 else "+.1f" if size < 99.95 else "+,.0f" if size < 1e6 else "+.1e"
    return figure(value, spec, unit, 100.0)


def interval(value: Any) -> tuple[float, float] | None:
    """``[low, high]`` as a pair of finite numbers in order, or None."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (min(low, high), max(low, high))


def needle(run: Mapping[str, Any]) -> str:
    """Needles found, as "2/3" where each answer is known, else as a share; "uninformative" stays as it is."""
    share, hits = run.get("needle"), run.get("needle_hits")
    if isinstance(share, str):
        return share
    if hits:
        return f"{sum(bool(hit) for _, hit in hits)}/{len(hits)}"
    return figure(share, ".0f", " %", 100.0)


def decode_gap(candidate: Mapping[str, Any]) -> bool:
    """True when cached decoding and teacher forcing disagree: on the same tokens beyond the paired interval and a tenth of a
    per cent, or, in results without that figure, when the intervals of the two increases do not touch."""
    paired = interval(candidate.get("decode_gap_interval"))
    if paired is not None:
        return (paired[0] > 0 or paired[1] < 0) and abs(sum(paired)) / 2 >= 1e-3
    forced = interval(candidate.get("ppl_increase_interval"))
    decode = interval(candidate.get("decode_ppl_increase_interval"))
    return forced is not None and decode is not None and (forced[0] > decode[1] or decode[0] > forced[1])


def ordered(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The candidates, best verdict first, and within a verdict the fastest prefill first."""

    def key(candidate: Mapping[str, Any]) -> tuple[int, float]:
        verdict = candidate.get("verdict")
        rank = ORDER.index(verdict) if verdict in ORDER else len(ORDER)
        return rank, -(finite(candidate.get("prefill_speedup")) or 0.0)

    return sorted(results["candidates"], key=key)


def table(results: Mapping[str, Any]) -> Table:
    """What ``foveal tune`` prints: the baseline, then every candidate, winners first; fits 120 columns.

    Args:
        results: the dictionary of ``results.json``.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    baseline, limit = results["baseline"], results.get("max_ppl_increase")
    shown = Table(
        title=Text(f"{results['model']} at {results['context']} tokens, {results['dtype']}", style="bold"), title_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left", caption=Text(_caption(results), style="dim"),
    )  # fmt: skip
    shown.add_column("attention", overflow="fold", min_width=14)
    for name in (
        "density",
        "tile\ndensity",
        "prefill\n×",
        "decode\n×",
        "peak\nmem ×",
        "ppl\nΔ %",
        "decode\nppl Δ %",
        "KL",
        "needle",
    ):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    shown.add_row(
        Text(f"{baseline['name']} (baseline)"), MISSING, MISSING, "1.00", "1.00", "1.00", "0", "0", "0", needle(baseline), "", style="bold",
        end_section=True,
    )  # fmt: skip
    for candidate in ordered(results):
        verdict = candidate.get("verdict", "")
        shown.add_row(
            Text(candidate["name"]),
            figure(candidate.get("density")),
            figure(candidate.get("tile_density")),
            _judged(candidate.get("prefill_speedup"), figure(candidate.get("prefill_speedup"), ".2f"), low=1.0),
            _judged(candidate.get("decode_speedup"), figure(candidate.get("decode_speedup"), ".2f"), low=1.0),
            figure(candidate.get("peak_ratio"), ".2f"),
            _judged(candidate.get("ppl_increase"), percent(candidate.get("ppl_increase"), ""), high=limit),
            _judged(
                candidate.get("decode_ppl_increase"),
                percent(candidate.get("decode_ppl_increase"), "") + (GAP if decode_gap(candidate) else ""),
                high=limit,
            ),
            small(candidate.get("kl")),
            MISSING if candidate.get("needle") == "uninformative" else needle(candidate),
            Text(_SHORT.get(verdict, verdict)),
            style=_STYLE.get(verdict, ""),
        )
    return shown


def _judged(value: Any, text: str, low: float | None = None, high: float | None = None) -> Any:
    """The text in red when the value lies outside its limits or is not a number at all."""
    from rich.text import Text

    lost = isinstance(value, float) and (
        math.isnan(value) or (low is not None and value < low) or (high is not None and value > high)
    )
    return Text(text, style="not dim red") if lost else Text(text)


def _caption(results: Mapping[str, Any]) -> str:
    baseline = results["baseline"]
    lines = [
        f"Baseline {baseline['name']}: prefill {figure(baseline.get('prefill_s'), '.3g')} s, decode {figure(baseline.get('decode_tok_s'), '.3g')} "
        f"tokens/s, peak {figure(baseline.get('peak_mb'), ',.0f')} MB, perplexity {figure(baseline.get('ppl'), '.4g')} (decode "
        f"{figure(baseline.get('decode_ppl'), '.4g')}). Limit {figure(results.get('max_ppl_increase'), '.3g', ' %', 100.0)}.",
    ]
    if any(decode_gap(c) for c in results["candidates"]):
        lines.append(f"{GAP} decode and teacher-forced loss differ by more than their intervals.")
    if not results.get("needle_informative", True):
        lines.append(f"Needle: uninformative, the dense model itself finds {needle(baseline)}.")
    return "\n".join(lines)
