"""Kinetics' sparse frontier with three tiny models: sampled chains of modular arithmetic, decoded densely and with a budget of keys.

Every model samples the same questions with the same random numbers under every method, so methods differ by what they drop and not by
luck. A trial is right when its whole chain is: the last number alone is right by luck once in ``MODULUS``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...bench.results import rounded
from ...core.budget import Budget
from ...data.chains import LINE, Chains, chains, vocabulary
from ...models import DecoderLM, Memory, shifted_factory
from ...patterns.dense import Dense
from ...patterns.token_topk import TokenTopK
from ...patterns.topk import BlockTopK
from ...policies import Policy
from ...policies.kinetics import DENSE, HARDWARE, Method, ModelShape
from ...policies.kinetics_allocation import (
    Choice,
    Trace,
    best_within,
    by_question,
    common_choices,
    envelope,
    log_spaced,
    oracle_accuracy,
)
from ...recipes.fit import fit, stage_at
from .command import run_measures
from .results import write_result

MODULUS, MOST = 11, 40
DEPTH, HEADS, KV_HEADS = 2, 4, 2
WIDTHS = {"0.3M": 128, "1M": 224, "3M": 384}
STAGES = ((150, 6), (50, 16), (200, MOST))
"""Curriculum: (steps, longest chain)."""
TOKENS, RATE = 1280, 0.4
"""Tokens of a batch, and the learning rate times the width."""
TEMPERATURE, TRIALS, ROWS = 1.0, 16, 256
QUESTIONS = {10: 16, 20: 16, 40: 16}
"""Questions by length of their chains."""
BUDGETS = (8, 16, 32)
BLOCK = 4
SEEDS, SHARE, CAPABLE = 1, 0.8, 0.3
"""The criterion's share of cost points, and the coverage that some dense model must reach at all."""

WAYS = ("oracle", "common")
SPARSE = tuple(Method("topk", budget=b) for b in BUDGETS)
BLOCKS = tuple(Method("block_topk", block=BLOCK, blocks=b // BLOCK - 1, local=BLOCK) for b in BUDGETS)


def policy(method: Method) -> Policy | None:
    """How the backbone decodes by a method; prefill is dense in all."""
    if method.kind == "dense":
        return None
    tokens = Budget(tokens=int(method.keys))
    if method.kind == "topk":
        return Policy.uniform(Dense(), TokenTopK(tokens, sinks=0))
    return Policy.uniform(Dense(), BlockTopK(tokens, kv_block=method.block, sinks=0, per_head=False))


def trained(name: str, seed: int) -> tuple[DecoderLM, ModelShape]:
    """A model that has learned to calculate, and its shape for the cost law; the embedding is looked up and not counted."""
    width = WIDTHS[name]
    model = DecoderLM(
        vocabulary(MODULUS, MOST), width, DEPTH, HEADS, KV_HEADS, attention=shifted_factory(width, HEADS, KV_HEADS), seed=seed
    )  # fmt: skip
    lengths = [steps for steps, _ in STAGES]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        longest = STAGES[stage_at(step, lengths)][1]
        length = int(torch.randint(max(1, longest // 2), longest + 1, (1,), generator=generator))
        rows = max(1, TOKENS // ((2 + LINE) * length + 2))
        task = chains(rows, length, generator, modulus=MODULUS, most=MOST)
        return model.loss(task.ids, task.answer)

    fit(model, loss, sum(lengths), lr=RATE / width, seed=seed)
    parameters = sum(p.numel() for p in model.parameters()) - model.embed.weight.numel()
    return model, ModelShape(name, parameters, DEPTH, HEADS, KV_HEADS, width // HEADS)


@torch.inference_mode()
def sampled(model: DecoderLM, question: Tensor, count: int, how: Policy | None, generator: torch.Generator) -> Tensor:
    """``(B, count)`` tokens sampled after ``question`` ``(B, N)`` at ``TEMPERATURE``."""
    memory, ids, out = Memory(), question, []
    for _ in range(count):
        chance = torch.softmax(model(ids, how, memory)[:, -1] / TEMPERATURE, -1)
        ids = torch.multinomial(chance, 1, generator=generator)
        out.append(ids)
    return torch.cat(out, 1)


def right(model: DecoderLM, task: Chains, method: Method, seed: int) -> Tensor:
    """``(questions, TRIALS)`` bool: which sampled answers are right; the random numbers depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    count, how = task.ids.shape[1] - task.prompt, policy(method)
    found = []
    for rows in torch.arange(len(task.ids)).repeat_interleave(TRIALS).split(ROWS):
        part = Chains(task.ids[rows], task.answer[rows], task.prompt)
        found.append(part.right(sampled(model, part.question, count, how, generator)))
    return torch.cat(found).unflatten(0, (-1, TRIALS))


def traces(model: DecoderLM, shape: ModelShape, methods: Iterable[Method], seed: int) -> list[Trace]:
    """What the model did with every question by every method."""
    out = []
    for length, count in QUESTIONS.items():
        task = chains(count, length, torch.Generator().manual_seed(1_000_003 + seed), modulus=MODULUS, most=MOST)
        lengths = (LINE * length,) * TRIALS
        for method in methods:
            for i, row in enumerate(right(model, task, method, seed).tolist()):
                out.append(Trace(f"{length}/{i}", shape, method, task.prompt, lengths, tuple(row)))
    return out


def frontier(found: Sequence[Trace], way: str, limits: Sequence[float], **device: Any) -> list[float]:
    """Accuracy at each cost limit: ``"oracle"`` lets every question have its own choice, as the paper does, ``"common"`` makes one for all."""
    per_question = by_question(found, **device)
    if way == "oracle":
        return oracle_accuracy(per_question, limits)
    front = envelope(common_choices(per_question))
    best = [best_within(front, limit) for limit in limits]
    return [0.0 if c is None else c.accuracy for c in best]


def cost_points(found: Iterable[Trace], way: str, **device: Any) -> list[float]:
    """A hundred costs, evenly spaced in the logarithm, from the cheapest to the dearest choice that the traces allow."""
    per_question = by_question(found, **device)
    allowed = common_choices(per_question) if way == "common" else [*chain.from_iterable(per_question.values())]
    return log_spaced(min(c.cost for c in allowed), max(c.cost for c in allowed))


def compared(sparse: Sequence[float], dense: Sequence[float]) -> dict[str, float]:
    """Of the points where either reaches anything: the share where sparse is at least, and more, accurate; and its largest lead and lag."""
    leads = [s - d for s, d in zip(sparse, dense, strict=True) if s > 0 or d > 0]
    if not leads:
        return {"at_least": 0.0, "above": 0.0, "largest_lead": 0.0, "largest_lag": 0.0}
    return {
        "at_least": fmean(lead >= -1e-9 for lead in leads),
        "above": fmean(lead > 1e-9 for lead in leads),
        "largest_lead": max(leads),
        "largest_lag": max(0.0, -min(leads)),
    }


def owners(found: Sequence[Trace], **device: Any) -> dict[str, float]:
    """Model → share of the cost points at which the best common choice is its own, where there is one; on the traces' own costs."""
    front = envelope(c for c in common_choices(by_question(found, **device)) if c.accuracy > 0)
    best = [best_within(front, limit) for limit in cost_points(found, "common", **device)]
    count = Counter(c.model for c in best if c is not None)
    return {model: round(n / sum(count.values()), 3) for model, n in count.items()}


def cheaper(sparse: Sequence[Trace], dense: Sequence[Trace]) -> float | None:
    """How many times cheaper sparse reaches dense's best accuracy, one choice for all questions; None when it never does."""

    def front(found: Sequence[Trace]) -> list[Choice]:
        return envelope(common_choices(by_question(found)))

    best = front(dense)[-1]
    reached = next((c for c in front(sparse) if c.accuracy >= best.accuracy), None)
    return None if reached is None else round(best.cost / reached.cost, 2)


def one(seed: int) -> dict[str, Any]:
    """Train three models from one seed and compare their frontiers."""
    found: dict[str, list[Trace]] = {"dense": [], "topk": [], "block_topk": []}
    single: dict[str, dict[str, float]] = {}
    sizes = {}
    for name in WIDTHS:
        model, shape = trained(name, seed)
        sizes[name] = int(shape.parameters)
        for trace in traces(model, shape, (DENSE, *SPARSE, *BLOCKS), seed):
            found[trace.method.kind].append(trace)
    for trace in chain.from_iterable(found.values()):
        by_length = single.setdefault(f"{trace.model.name}, {trace.method}", {})
        steps = trace.question.partition("/")[0]
        by_length[steps] = by_length.get(steps, 0.0) + fmean(trace.correct) / QUESTIONS[int(steps)]
    limits = {way: cost_points(found["dense"], way) for way in WAYS}
    curves = {kind: {way: frontier(some, way, limits[way]) for way in WAYS} for kind, some in found.items()}
    return {
        "parameters": sizes,
        "single_trial": {name: {n: round(v, 4) for n, v in row.items()} for name, row in single.items()},
        **{kind: {way: compared(curves[kind][way], curves["dense"][way]) for way in WAYS} for kind in ("topk", "block_topk")},
        "cheaper_at_dense_best": {kind: cheaper(found[kind], found["dense"]) for kind in ("topk", "block_topk")},
        "owners": {
            "dense": owners(found["dense"]), "topk": owners(found["topk"]), "dense, compute only": owners(found["dense"], intensity=0.0)
        },
        "best_dense": max(curves["dense"]["common"]),
        "frontiers": {"teflops": {way: [x / 1e12 for x in points] for way, points in limits.items()}, **curves},
    }  # fmt: skip


def judge(runs: Sequence[Mapping[str, Any]]) -> str:
    """Reproduced when in every seed token top-k is at least as accurate at enough cost points, both with the paper's choice per
    question, which a method with several budgets may win by luck, and with one choice for all."""

    def enough(way: str) -> bool:
        return all(run["best_dense"] >= CAPABLE and run["topk"][way]["at_least"] >= SHARE for run in runs)

    oracle, common = enough("oracle"), enough("common")
    return "reproduced" if oracle and common else "direction holds" if oracle or common else "not reproduced"


def measure_frontier(seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``sparse-frontier``."""
    runs = [one(s) for s in range(seed, seed + seeds)]

    def mean(kind: str, way: str, what: str) -> float:
        return fmean(run[kind][way][what] for run in runs)

    numbers = {
        "ours": f"top-k at least as accurate as dense at {100 * mean('topk', 'oracle', 'at_least'):.0f} % of the costs with a choice per question, "
        f"{100 * mean('topk', 'common', 'at_least'):.0f} % with one for all (more accurate at {100 * mean('topk', 'common', 'above'):.0f} %, "
        f"by up to {100 * mean('topk', 'common', 'largest_lead'):.0f} points, less by up to {100 * mean('topk', 'common', 'largest_lag'):.0f}); "
        f"block top-k {100 * mean('block_topk', 'common', 'at_least'):.0f} %",
        "criterion": f"at least dense's accuracy at ≥ {SHARE} of the cost points, both ways of choosing; some dense choice reaches {CAPABLE}",
        "task": f"chains of {', '.join(map(str, QUESTIONS))} operations modulo {MODULUS}, {sum(QUESTIONS.values())} questions × {TRIALS} trials at temperature {TEMPERATURE}",
        "methods": [str(m) for m in (DENSE, *SPARSE, *BLOCKS)],
        "flop_per_byte": HARDWARE["b200"].intensity,
        "training_steps": sum(steps for steps, _ in STAGES),
        "seeds": seeds,
        "runs": runs,
    }  # fmt: skip
    return write_result("kinetics", "sparse-frontier", judge(runs), rounded(numbers), seed=seed, out=out)


if __name__ == "__main__":
    run_measures(__doc__, [measure_frontier], brief=True)
