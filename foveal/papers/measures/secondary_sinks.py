"""Secondary sinks' claims that a CPU can check: sinks planted into random decoders, and a scan of SmolLM2.

Run ``python -m foveal.papers.measures.secondary_sinks`` to measure them and write their result files.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ...core.ranks import spearman
from ...data import text
from ...hf.load import load_model
from ...lens.planted_sinks import Plant, expected, planted, small_decoder
from ...lens.sinks import SinkScan, scan_sinks
from .command import run_measures
from .results import write_result

PLANTS, TOKENS, LAYERS, DIM = 100, 40, 12, 64
SIZES = (17.0, 20.0, 23.0, 26.0, 29.0, 2000.0)
"""Sizes ``c`` of the vectors written, from mostly no sink to alive until the window ends (larger ones all are, and would tie)."""
ON, OFF, PRIMARY = 1, 11, 3e4
MODEL, CONTEXT, TEXTS = "smollm2", 2048, 4


@torch.no_grad()
def one_plant(seed: int) -> dict[str, Any]:
    """Plant one sink of every size at tokens and a birth block drawn from ``seed``; compare what is found with what geometry says."""
    g = torch.Generator().manual_seed(seed)
    model = small_decoder(seed, LAYERS, DIM)
    ids = torch.randint(3, 97, (1, TOKENS), generator=g)
    direction = torch.nn.functional.normalize(torch.randn(DIM, generator=g), dim=0)
    tokens = (torch.randperm(TOKENS - 4, generator=g)[: len(SIZES)] + 4).tolist()
    birth = int(torch.randint(ON + 1, OFF - 2, (1,), generator=g))
    plant = Plant(direction, PRIMARY, ON, OFF, tokens, birth, SIZES)
    with planted(model, plant) as stream:
        (found,) = scan_sinks(model, ids).sinks
    want = {t: level for t in range(2, TOKENS) if (level := expected(stream, plant, t))}
    got = {s.position: s.level for s in found.found if s.position > 1}
    lifetimes = [want.get(t, (0, 0))[1] for t in tokens]
    return {
        "birth": birth, "window": found.primary is not None and (found.primary.on, found.primary.off) == (ON, OFF),
        "right": sum(want.get(t) == level for t, level in got.items()), "found": len(got), "planted": len(want),
        "lifetimes": [got.get(t, (0, 0))[1] for t in tokens], "monotone": lifetimes == sorted(lifetimes),
    }  # fmt: skip


def measure_lifetime(*, plants: int = 0, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``norm-decides-lifetime``: recall, precision, levels, and lifetime against the size written, over ``plants`` decoders."""
    plants = plants or PLANTS
    runs = [one_plant(seed + i) for i in range(plants)]
    right, found, there = (sum(r[name] for r in runs) for name in ("right", "found", "planted"))
    mean = torch.tensor([fmean(r["lifetimes"][i] for r in runs) for i in range(len(SIZES))])
    rho = spearman(torch.tensor(SIZES), mean)
    exact = right == found == there and all(r["window"] for r in runs)
    monotone = sum(r["monotone"] for r in runs)
    verdict = "reproduced" if exact and rho > 0.999 else "direction holds" if rho > 0.5 else "not reproduced"
    numbers = {
        "recall": round(right / max(there, 1), 4), "precision": round(right / max(found, 1), 4), "sinks": there, "plants": plants,
        "mean_lifetime_by_size": {str(c): round(float(m), 3) for c, m in zip(SIZES, mean, strict=True)}, "spearman_of_means": round(rho, 4),
        "decoders_with_lifetimes_in_order_of_size": monotone,
        "setting": {"layers": LAYERS, "dim": DIM, "tokens": TOKENS, "window": [ON, OFF], "primary": PRIMARY},
        "ours": f"{right} of {there} planted levels exact, {found - right} false; lifetime against size: Spearman {rho:.2f} over the means, "
        f"in order in {monotone} of {plants} decoders",
    }  # fmt: skip
    return write_result("secondary_sinks", "norm-decides-lifetime", verdict, numbers, seed=seed, out=out)


def measure_small_model(
    *, model: str = MODEL, context: int = CONTEXT, texts: int = TEXTS, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``small-model-scan``: the primary window, secondary sinks and scores of a small decoder on English prose."""
    loaded = load_model(model, dtype="float32", device="cpu")
    ids = text.tokens(loaded.tokenizer, text.load_text())
    spans = text.split(ids, context, search=0, held_out=texts, seed=seed, ahead=text.prefix(loaded.tokenizer)).held_out
    scans = [scan_sinks(loaded.model, span[None]) for span in spans]
    primaries = [s.sinks[0].primary for s in scans]
    tokens = {
        (int(span[x.position]), x.position) for span, s in zip(spans, scans, strict=True) for x in s.sinks[0].secondary
    }
    counts = [len(s.sinks[0].secondary) for s in scans]
    scores = [_primary_scores(s) for s in scans if s.sinks[0].primary is not None]
    numbers = {
        "model": loaded.name, "context": context, "texts": texts,
        "primary": [None if p is None else asdict(p) for p in primaries],
        "secondary": counts, "secondary_without_duplicates": len(tokens),
        "levels": [[*level, n] for s in scans for level, n in s.sinks[0].levels().items()],
        "score_before_window": round(fmean(x[0] for x in scores), 4) if scores else None,
        "score_inside_window": round(fmean(x[1] for x in scores), 4) if scores else None,
        "first_key_by_layer": [round(fmean(s.attention[i].share for s in scans), 4) for i in range(len(scans[0].attention))],
        "massive_activation": round(fmean(s.activations.mean for s in scans), 2),
        "ours": _in_words(primaries, counts, scores),
    }  # fmt: skip
    same = len({(p.position, p.on, p.off) if p else None for p in primaries}) == 1
    return write_result(
        "secondary_sinks", "small-model-scan", "reproduced" if same else "direction holds", numbers, seed=seed, out=out
    )


def _primary_scores(scan: SinkScan) -> tuple[float, float]:
    """The primary's sink score before its window and inside it, means over layers."""
    primary = scan.sinks[0].primary
    assert primary is not None
    score = scan.scores()[0, :, primary.position]
    before = score[: primary.on]
    return float(before.mean()) if len(before) else 0.0, float(score[primary.on : primary.off].mean())


def _in_words(primaries: list[Any], counts: list[int], scores: list[tuple[float, float]]) -> str:
    first = primaries[0]
    if first is None:
        return "no primary sink"
    inside, before = fmean(s[1] for s in scores), fmean(s[0] for s in scores)
    return (
        f"primary at position {first.position}, layers {first.on} to {first.off - 1}; {sum(counts)} secondary sinks in {len(counts)} texts; "
        f"the primary's score is {inside:.2f} inside its window and {before:.2f} before it"
    )


def main() -> None:
    """Measure the claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims about secondary sinks.", (measure_lifetime, measure_small_model), brief=True)


if __name__ == "__main__":
    main()
