"""The ways to find a policy side by side: one candidate each, on the same text, under the same limit of loss."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError
from ..patterns.flux import Flux
from ..policies.policy import Policy, Rule
from .candidates import Candidate
from .table import figure, percent

if TYPE_CHECKING:
    from rich.table import Table

ROUTER = "router.safetensors"
"""Name of the routers beside a policy that uses them."""


def flux_candidate(router: str, fingerprint: str, layers: int) -> Candidate:
    """The routed policy of a file of routers; named by its digest, so that a journal never takes one for another.

    Raises:
        ConfigError: the file is missing or damaged, or its routers belong to another model.
    """
    flux = Flux.of_file(router)
    flux.check_model(lambda: fingerprint, layers)
    name = f"flux {flux.router_sha256[:8]}"
    return Candidate(name, Policy.uniform(flux, name=name), "routed", "flux")


def beside_policy(policy: Policy, folder: Path) -> Policy:
    """The policy with its routers copied into its folder and named by file name alone, so that the folder can be moved."""
    flux = policy.default.prefill
    if not isinstance(flux, Flux):
        return policy
    source, target = Path(flux.router), folder / ROUTER
    if source.resolve() != target.resolve():
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise ConfigError(f"router {source} cannot be copied to {folder}: {error}.") from None
    return replace(policy, default=Rule(replace(flux, router=ROUTER)))


def side_by_side(rows: Sequence[Mapping[str, Any]], methods: Sequence[str], limit: float) -> dict[str, Any]:
    """The best candidate of ``uniform`` and of each method that searched, and who wins by how much.

    Best is the fastest prefill among those that are within the limits (both perplexities and the needles), else the smallest loss.
    A method that found nothing came back to dense. The winner is the fastest within the limits, where it beats dense.

    Args:
        rows: judged candidates of the results. methods: those that ran. limit: largest increase of perplexity.

    Returns:
        ``limit``, ``rows`` (fastest within the limits first), ``winner`` (None where dense stays), ``runner_up``, ``margin``
        (prefill speed of the winner over the runner-up's, minus 1) and ``said``.
    """
    dense = next(r for r in rows if r["name"] == "dense")
    found: list[dict[str, Any]] = []
    for method in ("uniform", *methods):
        own = [r for r in rows if r["method"] == method] or [dense]
        best = max(own, key=lambda r: (_within(r), r["prefill_speedup"] if _within(r) else -r["ppl_increase"]))
        kept = ("name", "prefill_speedup", "decode_speedup", "ppl_increase", "decode_ppl_increase", "kl", "density", "peak_ratio", "verdict")  # fmt: skip
        found.append({"method": method, "within": _within(best), **{k: best.get(k) for k in kept}})
    found.sort(key=lambda r: (not r["within"], -r["prefill_speedup"] if r["within"] else r["ppl_increase"]))
    inside = [r for r in found if r["within"]]
    winner = inside[0] if inside and inside[0]["prefill_speedup"] > 1.0 and inside[0]["name"] != "dense" else None
    second = inside[1] if winner is not None and len(inside) > 1 else None
    margin = None if winner is None or second is None else winner["prefill_speedup"] / second["prefill_speedup"] - 1
    return {
        "limit": limit, "rows": found, "winner": winner["method"] if winner else None,
        "runner_up": second["method"] if second else None, "margin": margin, "said": _said(winner, second, margin, limit),
    }  # fmt: skip


def _within(row: Mapping[str, Any]) -> bool:
    return row.get("verdict") != "over the loss limit"


def _said(winner: Mapping[str, Any] | None, second: Mapping[str, Any] | None, margin: float | None, limit: float) -> str:  # fmt: skip
    if winner is None:
        return f"No method found anything faster than dense attention within {limit:.1%} perplexity."
    text = f"{winner['method']} wins with {winner['name']}: {winner['prefill_speedup']:.2f}× dense at {percent(winner['ppl_increase'])} perplexity"  # fmt: skip
    if second is None or margin is None:
        return text + "; no other method stayed within the limits."
    return text + f", {margin:.0%} faster than {second['method']} ({second['name']}, {second['prefill_speedup']:.2f}× at {percent(second['ppl_increase'])})."  # fmt: skip


def as_candidates(results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The results with one candidate per method, for the plot of speed against loss; None where only one method ran."""
    methods = results.get("methods") or {}
    rows = methods.get("rows") or []
    if len(rows) < 2:
        return None
    by_name = {c["name"]: c for c in results["candidates"]}
    shown = [
        {
            **by_name[r["name"]],
            "name": r["method"],
            "verdict": "chosen" if r["method"] == methods["winner"] else _verdict(r),
        }
        for r in rows
    ]
    return {**results, "candidates": shown}


def _verdict(row: Mapping[str, Any]) -> str:
    return "allowed" if row["verdict"] == "chosen" else str(row["verdict"])


def methods_table(results: Mapping[str, Any]) -> Table | None:
    """What ``foveal tune`` prints below its table; None where only one method ran."""
    methods = results.get("methods") or {}
    if len(methods.get("rows") or []) < 2:
        return None
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(
        title=Text("Methods side by side", style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
        caption=Text(methods["said"], style="dim"), caption_justify="left",
    )  # fmt: skip
    shown.add_column("method")
    shown.add_column("its best")
    for name in ("density", "prefill ×", "decode ×", "ppl Δ %", "decode ppl Δ %"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("")
    for row in methods["rows"]:
        won = row["method"] == methods["winner"]
        shown.add_row(
            row["method"], Text(row["name"]), figure(row["density"]), figure(row["prefill_speedup"], ".2f"),
            figure(row["decode_speedup"], ".2f"), percent(row["ppl_increase"], ""), percent(row["decode_ppl_increase"], ""),
            "wins" if won else "" if row["within"] else "over limit", style="bold green" if won else "" if row["within"] else "dim",
        )  # fmt: skip
    return shown
