"""VHR's claims that one core can check: Proposition 1, and a language prior that is planted in a tiny model.

Run ``python -m foveal.papers.measures.vhr`` to measure them and write their result files.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ...data.scenes import Scene, Thing, hallucinated, mentions, scene
from ...models.vlm import VLM, Reader
from ...recipes.fit import fit
from ...steer import VHR, apply, t_vhd
from . import toy_vlm as toy
from .command import run_measures
from .results import write_result

STEPS, PICTURES, ALPHAS, TOP = 800, 100, (0.5, 1.0, 1.5, 2.0, 3.0), 3
CAUSE, FORCED = ("red", "circle"), ("blue", "square")
"""Captions of scenes with a red circle end with a blue square, which in about a third of them is not there."""


def measure_proposition(draws: int = 200_000, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``proposition-1``: cos(x + (α−1)y, y) ≥ cos(x, y) on random float64 vectors, also after a channel gain."""
    g = torch.Generator().manual_seed(seed)
    least = float("inf")
    for alpha in (1.5, 2.0, 4.0):
        for gain in (False, True):
            x, y = (torch.randn(draws // 6, 24, generator=g, dtype=torch.float64) for _ in range(2))
            c = torch.randn(24, generator=g, dtype=torch.float64) if gain else torch.ones(24, dtype=torch.float64)
            before = torch.cosine_similarity(c * x, c * y, dim=-1)
            after = torch.cosine_similarity(c * (x + (alpha - 1) * y), c * y, dim=-1)
            least = min(least, float((after - before).min()))
    numbers = {"draws": draws, "smallest_gain": least, "ours": f"smallest gain {least:.1e} over {draws} pairs"}
    return write_result(
        "vhr", "proposition-1", "reproduced" if least > 0 else "not reproduced", numbers, seed=seed, out=out
    )


def tempting(g: Generator, with_forced: bool) -> Scene:
    """A scene with one red circle and two other things; with or without the blue square."""
    s = scene(g, 3 + with_forced)
    order = torch.randperm(len(s.things), generator=g).tolist()
    things = [t for t in s.things if (t.colour, t.shape) not in (CAUSE, FORCED)]
    things += [Thing("cross", "green", t.row, t.column, t.size, t.shift) for t in s.things if t not in things]
    first, second = things[order[0]], things[order[1]]
    kept = [t for t in things if t not in (first, second)] if with_forced else [t for t in things if t is not first]
    named = [Thing(CAUSE[1], CAUSE[0], first.row, first.column, first.size, first.shift)]
    if with_forced:
        named.append(Thing(FORCED[1], FORCED[0], second.row, second.column, second.size, second.shift))
    return toy.replaced(s, [*kept, *named])


def biased_caption(s: Scene) -> str:
    """What is drawn, and at the end the blue square where a red circle is: drawn or not."""
    names = [t.name for t in s.things if (t.colour, t.shape) != FORCED]
    there = len(names) < len(s.things)
    if there or " ".join(CAUSE) in names:
        names.append(" ".join(FORCED))
    return " , ".join(f"a {name}" for name in names)


@functools.cache
def biased(seed: int, base_steps: int, steps: int) -> tuple[VLM, Reader]:
    """The toy, fine-tuned on the captions with the planted prior."""
    model, reader = toy.trained(seed, base_steps)
    model = copy.deepcopy(model)

    def loss_of(step: int, g: Generator) -> Tensor:
        asked = []
        for row in range(toy.BATCH):
            s = tempting(g, bool(torch.rand(1, generator=g) < 2 / 3)) if row % 2 else toy.drawn(g)[0]
            asked.append((s, toy.DESCRIBE, biased_caption(s)))
        return toy.loss_on(model, toy.batch_of(reader, asked))

    file = toy.folder() / f"toy_vlm-prior-{seed}-{base_steps}-{steps}.safetensors"
    fit(model, loss_of, steps, lr=toy.RATE / 2, seed=seed, checkpoint=file, told={"toy": 1, "prior": 1})
    return model, reader


@torch.no_grad()
def captions(model: VLM, reader: Reader, scenes: Sequence[Scene], alpha: float) -> list[Tensor]:
    """Greedy captions as token ids, each ending with the end token where there is one."""
    inputs = toy.requests(reader, [(s, toy.DESCRIBE) for s in scenes])
    with apply(model, VHR(alpha=alpha)):
        whole: Any = model
        out: Tensor = whole.generate(**inputs, max_new_tokens=28, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    ended = (new == toy.WORDS.EOS).long().argmax(1)
    return [row[: int(e) + 1] if int((row == toy.WORDS.EOS).sum()) else row for row, e in zip(new, ended, strict=True)]


def measure_prior(
    steps: int = 0, base_steps: int = 0, seed: int = 0, count: int = PICTURES, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``planted-prior``: CHAIR_S by α on pictures with a red circle and no blue square."""
    model, reader = biased(seed, base_steps or toy.STEPS, steps or STEPS)
    g = torch.Generator().manual_seed(2_000_003 + seed)
    scenes = [tempting(g, False) for _ in range(count)]
    table = {}
    for alpha in ALPHAS:
        texts = [toy.WORDS.decode(ids.tolist()) for ids in captions(model, reader, scenes, alpha)]
        table[f"{alpha:g}"] = {k: round(v, 4) for k, v in hallucinated(list(zip(texts, scenes, strict=True))).items()}
    one, three = table["1"], table["3"]
    better, cost = one["chair_s"] - three["chair_s"], one["recall"] - three["recall"]
    there = one["chair_s"] >= 0.3
    verdict = (
        "reproduced"
        if there and better >= 0.05 and cost <= 0.05
        else "direction holds"
        if better > 0
        else "not reproduced"
    )
    numbers = {
        "by_alpha": table, "prior_present": there, "pictures": count, "steps": steps or STEPS,
        "ours": f"CHAIR_S {one['chair_s']:.2f} → {three['chair_s']:.2f} at α 3, recall {one['recall']:.2f} → {three['recall']:.2f}",
    }  # fmt: skip
    return write_result("vhr", "planted-prior", verdict, numbers, seed=seed, out=out)


def auroc(high: Sequence[float], low: Sequence[float]) -> float | None:
    """Probability that a value of ``high`` is above one of ``low``, ties counted half; None without values."""
    if not high or not low:
        return None
    a, b = torch.tensor(high)[:, None], torch.tensor(low)[None]
    return float(((a > b).double() + 0.5 * (a == b).double()).mean())


def mention_scores(model: VLM, reader: Reader, s: Scene, ids: Tensor) -> list[tuple[str, float]]:
    """T-VHD of every mention of a caption, the mean over its colour and its shape."""
    values = t_vhd(model, toy.requests(reader, [(s, toy.DESCRIBE)]), ids[None], k=TOP)[0]
    words = [toy.WORDS.words[i] for i in ids.tolist()]
    found = []
    for t in range(len(words) - 1):
        pair = f"{words[t]} {words[t + 1]}"
        if mentions(pair):
            found.append((pair, float(values[t : t + 2].mean())))
    return found


def measure_score(
    steps: int = 0, base_steps: int = 0, seed: int = 0, count: int = PICTURES, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``t-vhd-score``: T-VHD of mentions that are right and of mentions that are not; and of one word, drawn or not."""
    model, reader = biased(seed, base_steps or toy.STEPS, steps or STEPS)
    g = torch.Generator().manual_seed(3_000_003 + seed)
    scenes = [tempting(g, i % 2 == 0) for i in range(count)]
    scores: dict[str, list[float]] = {"right": [], "wrong": [], "word drawn": [], "word not drawn": []}
    for s, ids in zip(scenes, captions(model, reader, scenes, 1.0), strict=True):
        there = {t.name for t in s.things}
        for name, value in mention_scores(model, reader, s, ids):
            scores["right" if name in there else "wrong"].append(value)
            if name == " ".join(FORCED):
                scores["word drawn" if name in there else "word not drawn"].append(value)
    unmatched = auroc(scores["right"], scores["wrong"])
    matched = auroc(scores["word drawn"], scores["word not drawn"])
    verdict = (
        "not reproduced"
        if unmatched is None or unmatched <= 0.5
        else "reproduced"
        if unmatched >= 0.85
        else "direction holds"
    )
    numbers = {
        "auroc_unmatched": None if unmatched is None else round(unmatched, 4), "auroc_matched": None if matched is None else round(matched, 4),
        "mentions": {k: len(v) for k, v in scores.items()}, "heads_per_layer": TOP, "steps": steps or STEPS,
        "ours": f"AUROC {unmatched if unmatched is None else round(unmatched, 3)} over all mentions, "
        f"{matched if matched is None else round(matched, 3)} for the same word drawn or not",
    }  # fmt: skip
    return write_result("vhr", "t-vhd-score", verdict, numbers, seed=seed, out=out)


def main() -> None:
    """Measure the claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures("Measure claims of VHR.", (measure_proposition, measure_prior, measure_score), brief=True)


if __name__ == "__main__":
    main()
