"""CSA in a small BMN on untrimmed digit videos: ten class scores of a recogniser of real digits beside 30 nuisance channels.

The network has 64, 32 and 96 channels, 8 samples a proposal and 32 steps; every training batch is new.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...data.digit_videos import CLASSES, NUISANCE, DigitVideos, Frames, digit_videos, frames
from ...layers.csa import CSA
from ...models.action import BMN
from ...models.action.detect import (
    THUMOS,
    Detections,
    average_recall,
    classify,
    mean_average_precision,
    proposals,
)
from ...models.action.targets import labels, losses
from ...recipes.fit import fit
from .results import sign_test, summary, write_result

T, WIDTHS, SAMPLES = 32, (64, 32, 96), 8
STEPS, BATCH, RATE, SEEDS = 300, 8, 3e-3, 5
HELD_OUT, KEEP, RECALL_AT = 200, 30, 10
VARIANTS = {"BMN": None, "control": "wider", "SE": "se", "CSA": "csa", "CSA + SE": "csa+se"}
LEAST_RATIO, LEAST_CORRELATION = 2.0, 0.3


@lru_cache(maxsize=1)
def sources() -> tuple[Frames, Frames]:
    """Pictures of training and held-out videos; one split and one recogniser for all runs."""
    return frames()


def held_out() -> DigitVideos:
    """The same videos for every run, of pictures that neither detector nor recogniser has seen."""
    return digit_videos(HELD_OUT, sources()[1], torch.Generator().manual_seed(1_000_003), steps=T)


def network(variant: str, seed: int) -> BMN:
    """A small BMN; all but the attention start alike in all variants."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BMN(CLASSES + NUISANCE, T, widths=WIDTHS, samples=SAMPLES, attention=VARIANTS[variant])


def trained(variant: str, seed: int, steps: int) -> BMN:
    """A network after ``steps`` batches, which the seed decides together with the start."""
    model = network(variant, seed)

    def loss(step: int, g: torch.Generator) -> Tensor:
        videos = digit_videos(BATCH, sources()[0], g, steps=T)
        return losses(model(videos.features), labels(videos.segments, T), g)["total"]

    fit(model, loss, steps, lr=RATE, warmup=min(20, steps), seed=seed)
    return model


@torch.no_grad()
def scored(model: BMN, videos: DigitVideos) -> dict[str, float]:
    """``average_map`` over the thresholds of THUMOS-14, the mAP at each, and the recall of the best ten proposals.

    A video's class scores, which BMN takes from elsewhere, are the recogniser's highest means over three steps.
    """
    found = proposals(model(videos.features), KEEP)
    classes = torch.nn.functional.avg_pool1d(videos.features[:, :CLASSES], 3, 1).amax(-1)
    counts = torch.tensor([len(s) for s in videos.segments])
    video = torch.arange(len(counts)).repeat_interleave(counts)
    truth = Detections(video, torch.cat(videos.segments), videos.label[video], torch.ones(len(video)))
    precision = mean_average_precision(classify(found, classes), truth)
    recall = average_recall(found, videos.segments, RECALL_AT)
    return {"average_map": fmean(precision.values())} | {f"map@{t}": precision[t] for t in THUMOS} | {"recall": recall}


def evidence(csa: CSA, videos: DigitVideos) -> dict[str, float]:
    """Where the gates look.

    Returns:
        ``ratio``: |∂w_c / ∂R|, summed over gates, steps and videos, of an informative channel over a nuisance channel, means over the
        channels of each kind; ``mass``: the same with sums over the channels; ``correlation`` of w_t with being inside an action.
    """
    r = videos.features.clone().requires_grad_()
    gate, size = csa.channel_gate(r), torch.zeros(r.shape[1])
    for c in range(gate.shape[1]):
        (slope,) = torch.autograd.grad(gate[:, c].sum(), r, retain_graph=True)
        size += slope.abs().sum((0, 2))
    informative, rest = size[:CLASSES], size[CLASSES:]
    with torch.no_grad():
        pair = torch.stack([csa.temporal_gate(r)[:, 0].flatten(), videos.action.float().flatten()])
        correlation = float(torch.corrcoef(pair.double())[0, 1].nan_to_num())
    return {
        "ratio": float(informative.mean() / rest.mean()),
        "mass": float(informative.sum() / rest.sum()),
        "correlation": correlation,
    }


def setting(steps: int, seeds: int) -> dict[str, Any]:
    """What a result says of how it was made."""
    return {"steps": steps, "batch": BATCH, "seeds": seeds, "videos": HELD_OUT, "T": T, "channels": CLASSES + NUISANCE}


def measure_evidence(steps: int = STEPS, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``gates-find-evidence``; the criterion on gradients is on means per channel, for which chance is 1."""
    videos = held_out()
    scores: dict[str, list[dict[str, float]]] = {"BMN": [], "CSA": []}
    looks = []
    for s in range(seed, seed + seeds):
        for variant, rows in scores.items():
            model = trained(variant, s, steps)
            rows.append(scored(model, videos))
            if isinstance(model.attention, CSA):
                looks.append(evidence(model.attention, videos))
    plain, gated = ([row["average_map"] for row in scores[v]] for v in ("BMN", "CSA"))
    mean = {name: fmean(look[name] for look in looks) for name in looks[0]}
    difference = [a - b for a, b in zip(gated, plain, strict=True)]
    numbers = {
        "ours": f"average mAP {100 * fmean(gated):.1f} % with CSA, {100 * fmean(plain):.1f} % without; gradient of the channel gate "
        f"{mean['ratio']:.1f} times as large on an informative channel ({mean['mass']:.1f} in all); correlation of the temporal gate "
        f"{mean['correlation']:+.2f}",
        "average_map": {v: summary([row["average_map"] for row in rows]) for v, rows in scores.items()},
        "csa_minus_bmn": summary(difference),
        "sign_test": sign_test(difference),
        "gradient_ratio_per_channel": summary([look["ratio"] for look in looks]),
        "gradient_ratio_of_sums": summary([look["mass"] for look in looks]),
        "correlation": summary([look["correlation"] for look in looks]),
        "criterion": {"gradient_ratio_per_channel": LEAST_RATIO, "correlation": LEAST_CORRELATION},
        "by_seed": {v: [{k: round(x, 4) for k, x in row.items()} for row in rows] for v, rows in scores.items()},
    } | setting(steps, seeds)
    no_worse = fmean(difference) >= 0
    if no_worse and mean["ratio"] > LEAST_RATIO and mean["correlation"] > LEAST_CORRELATION:
        verdict = "reproduced"
    else:
        verdict = "direction holds" if no_worse and mean["ratio"] > 1 and mean["correlation"] > 0 else "not reproduced"
    return write_result("csa", "gates-find-evidence", verdict, numbers, seed=seed, out=out)


def measure_complement(
    steps: int = STEPS, seeds: int = SEEDS, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``complements-self-gates``: both gates above either alone and above as many weights without a gate."""
    videos = held_out()
    scores = {v: [scored(trained(v, s, steps), videos) for s in range(seed, seed + seeds)] for v in VARIANTS}
    values = {v: [row["average_map"] for row in rows] for v, rows in scores.items()}
    mean = {v: fmean(x) for v, x in values.items()}
    both = values["CSA + SE"]
    ahead = {v: [a - b for a, b in zip(both, x, strict=True)] for v, x in values.items() if v != "CSA + SE"}
    gained = {
        v: [a - b for a, b in zip(x, values["control"], strict=True)] for v, x in values.items() if v != "control"
    }
    numbers = {
        "ours": "average mAP " + "; ".join(f"{v} {100 * m:.1f} %" for v, m in mean.items()),
        "average_map": {v: summary(x) for v, x in values.items()},
        "both_minus": {v: summary(d) for v, d in ahead.items()},
        "sign_test": {v: sign_test(d) for v, d in ahead.items()},
        "minus_control": {v: summary(d) for v, d in gained.items()},
        "sign_test_against_control": {v: sign_test(d) for v, d in gained.items()},
        "weights": {v: sum(p.numel() for p in network(v, seed).parameters()) for v in VARIANTS},
        "by_seed": {v: [{k: round(x, 4) for k, x in row.items()} for row in rows] for v, rows in scores.items()},
    } | setting(steps, seeds)
    above = all(mean["CSA + SE"] > mean[v] for v in ("CSA", "SE", "control"))
    verdict = "direction holds" if above else "not reproduced"
    return write_result("csa", "complements-self-gates", verdict, numbers, seed=seed, out=out)
