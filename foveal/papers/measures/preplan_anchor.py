"""The preplan-and-anchor rhythm's analysis claims: planted maps, and texts that SmolLM2 writes.

Run ``python -m foveal.papers.measures.preplan_anchor`` to measure them and write their result files; a few minutes on two cores, most
of it for writing the texts.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.base_mask import BaseMask
from ...hf.load import load_model
from ...kernels.call import AttentionCall
from ...lens.blocks import blocks
from ...lens.probe import KeyProbe, RowProbe, Site
from ...lens.probes import Influence, LookBack, WindowedDistance
from ...lens.rhythm import Ratio, Rhythm, coupling, entropy_at_peaks, model_rhythm, peaks, split_heads
from .command import run_measures
from .results import write_result

MODEL, TEXTS, NEW_TOKENS, TEMPERATURE = "smollm2", 24, 200, 0.7
MAPS, CHUNKS, HEADS, ANCHOR = 20, 12, 10, 4


def problem(rng: random.Random) -> str:
    """A word problem in the manner of the paper's data, with numbers of its own."""
    name = rng.choice(["Ada", "Ben", "Chen", "Dina", "Emil", "Fatou", "Goran", "Hana"])
    thing = rng.choice(["apples", "books", "stamps", "marbles", "pencils", "tickets"])
    a, b, c, d = (rng.randint(3, 40) for _ in range(4))
    return (
        f"{name} buys {a} boxes with {b} {thing} each, gives {c} {thing} to a friend and then finds {d} more. Half of what is left is sold. "
        f"How many {thing} does {name} have in the end? Think step by step, and explain every step in a sentence."
    )


@functools.cache
@torch.no_grad()
def written(model: str, texts: int, new_tokens: int, seed: int) -> tuple[tuple[Any, Any], ...]:
    """``(ids, first token of the response)`` of every text, sampled at the paper's temperature."""
    loaded = load_model(model, dtype="float32", device="cpu")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    out = []
    for _ in range(texts):
        prompt = _prompt(loaded.tokenizer, problem(rng))
        generate: Any = loaded.model.generate
        ids = generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=True, temperature=TEMPERATURE, top_k=0,
            pad_token_id=0,
        )  # fmt: skip
        out.append((ids, prompt.shape[1]))
    return tuple(out)


def _prompt(tokenizer: Any, question: str) -> Tensor:
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": question}]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return given["input_ids"]
    return tokenizer(question, return_tensors="pt")["input_ids"]


@functools.cache
def rhythms(model: str, texts: int, new_tokens: int, seed: int) -> tuple[Rhythm, ...]:
    """The rhythm of every text that has a response of more than 20 tokens (a shorter one has no anchors)."""
    loaded = load_model(model, dtype="float32", device="cpu")
    found = written(model, texts, new_tokens, seed)
    return tuple(model_rhythm(loaded.model, ids, start=start) for ids, start in found if ids.shape[1] - start > 20)


def _verdict(ratio: Ratio) -> str:
    return "reproduced" if ratio.low > 1 else "direction holds" if ratio.ratio > 1 else "not reproduced"


def _numbers(ratio: Ratio, found: tuple[Rhythm, ...], model: str, **more: Any) -> dict[str, Any]:
    return {
        "observed": round(ratio.observed, 4), "reference": round(ratio.reference, 4), "ratio": round(ratio.ratio, 4),
        "interval": [round(ratio.low, 4), round(ratio.high, 4)], "texts": len(found), "model": model,
        "tokens": sum(len(r.waad) for r in found), "temperature": TEMPERATURE, **more,
    }  # fmt: skip


def measure_entropy(
    *, model: str = MODEL, texts: int = TEXTS, new_tokens: int = NEW_TOKENS, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``entropy-at-waad-peaks``: mean prediction entropy at WAAD peaks over that of all tokens of the responses."""
    found = rhythms(model, texts, new_tokens, seed)
    ratio = entropy_at_peaks(list(found), seed)
    ours = f"{ratio.observed:.3f} against {ratio.reference:.3f}: ratio {ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] over {len(found)} texts"
    numbers = _numbers(ratio, found, model, ours=ours)
    return write_result("preplan_anchor", "entropy-at-waad-peaks", _verdict(ratio), numbers, seed=seed, out=out)


def measure_coupling(
    *, model: str = MODEL, texts: int = TEXTS, new_tokens: int = NEW_TOKENS, seed: int = 0, out: Path | None = None
) -> dict[str, Any]:
    """Claim ``anchors-follow-preplans``: FAI peaks at a WAAD peak or one token after it, over the same for as many random tokens."""
    found = rhythms(model, texts, new_tokens, seed)
    ratio = coupling(list(found), seed=seed)
    ours = f"{100 * ratio.observed:.1f} % against {100 * ratio.reference:.1f} % by chance: ratio {ratio.ratio:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    numbers = _numbers(ratio, found, model, within=1, ours=ours)
    return write_result("preplan_anchor", "anchors-follow-preplans", _verdict(ratio), numbers, seed=seed, out=out)


# --- planted maps -----------------------------------------------------------------------------------------------------


def planted_maps(seed: int) -> tuple[Tensor, list[int], list[int]]:
    """Causal maps ``(HEADS, N, N)``, the starts of their phrases, and their anchors.

    Phrases have random lengths. Local heads look one token back, at a phrase's first token eight back. Global heads look at the anchors,
    one a phrase, of all phrases that lie ten tokens behind. The remaining heads look a middle distance back.
    """
    rng = random.Random(seed)
    starts = [0]
    while len(starts) < CHUNKS:
        starts.append(starts[-1] + rng.randint(11, 19))
    n = starts[-1] + 24
    anchors = [s + ANCHOR for s in starts[:-1]]
    maps = torch.zeros(HEADS, n, n, dtype=torch.float64)
    for t in range(n):
        seen = [a for a in anchors if a <= t - 10] or [0]
        maps[:3, t, max(t - (8 if t in starts else 1), 0)] = 1
        maps[3:7, t, max(t - 5, 0)] = 1
        maps[7:, t, seen] = 1 / len(seen)
    return maps, starts[1:], anchors


def figures(maps: Tensor, probe: RowProbe | KeyProbe) -> Tensor:
    """A probe's ``(HEADS, N)`` on given maps, through the same blocks as a model's: a map's logarithm as the logits."""
    heads, n = maps.shape[:2]
    base = BaseMask.build(n, n, causal=True)
    key = torch.eye(n, dtype=maps.dtype).expand(1, heads, n, n)
    call = AttentionCall(maps.clamp(min=1e-30).log()[None], key, key, None, base, 1.0)
    site = Site(0, heads, 1, maps.dtype, maps.device, end=n, real=[torch.ones(1, n, dtype=torch.bool)])
    state: Any = probe.start(site)
    if isinstance(probe, RowProbe):
        state.append(site.zeros(n))
    else:
        state.reach(n)
    for block in blocks(call):
        probe.see(block, site, state)
    return probe.finish(site, state)[""].values[0]


def measure_planted(*, maps: int = MAPS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``planted-rhythm``: F1 of phrase starts and anchors, and whether the head split is right, over ``maps`` draws."""
    scores: dict[str, list[float]] = {"starts": [], "anchors": []}
    split = 0
    for i in range(maps):
        given, starts, anchors = planted_maps(seed + i)
        sets = split_heads(figures(given, LookBack()).mean(-1)[None])
        split += {h for _, h in sets.local} == {0, 1, 2} and {h for _, h in sets.far} == {7, 8, 9}
        waad = figures(given, WindowedDistance())[[h for _, h in sets.local]].mean(0)
        fai = figures(given, Influence())[[h for _, h in sets.far]].mean(0)
        fai[0] = 0  # rows without an anchor behind them look at the first token
        scores["starts"].append(f1(peaks(waad.numpy()).tolist(), starts))
        scores["anchors"].append(f1(peaks(fai.numpy()).tolist(), anchors))
    worst = min(min(s) for s in scores.values())
    verdict = "reproduced" if worst == 1 and split == maps else "direction holds" if worst > 0.5 else "not reproduced"
    numbers = {
        "smallest_f1": {name: min(s) for name, s in scores.items()}, "head_split_right": split, "maps": maps, "heads": HEADS,
        "ours": f"smallest F1 over {maps} maps: phrase starts {min(scores['starts']):.2f}, anchors {min(scores['anchors']):.2f}",
    }  # fmt: skip
    return write_result("preplan_anchor", "planted-rhythm", verdict, numbers, seed=seed, out=out)


def f1(found: list[int], there: list[int]) -> float:
    """Harmonic mean of precision and recall of positions."""
    right = len(set(found) & set(there))
    return 2 * right / max(len(found) + len(there), 1)


def main() -> None:
    """Measure the claims; ``--out`` is the folder of result files, by default the source checkout's."""
    run_measures(
        "Measure claims about the preplan-and-anchor rhythm.",
        (measure_planted, measure_entropy, measure_coupling),
        brief=True,
    )


if __name__ == "__main__":
    main()
