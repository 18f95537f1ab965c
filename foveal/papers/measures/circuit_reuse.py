"""Circuit reuse: do symbolic IOI and Colored Objects share heads in a small decoder, more than either shares with modular successor?"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from ...data.pairs import END, PromptPairs
from ...lens.circuits import SHARES, Circuit, Stage, find_circuit, jaccard, overlaps
from ...recipes.fit import fit
from .command import run_measures
from .results import summary, write_result

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DIM, DEPTH, HEADS = 128, 4, 8
NAMES, COLORS, THINGS, MODULUS = 12, 6, 6, 20
BATCH, TRAINING, LR, INIT = {"ioi": 24, "colored_objects": 32, "successor": 8, "copy": 16}, 3000, 1e-3, 0.08
LONGEST = 18
"""Tokens of every training row; ``copy`` repeats half as many."""
PROMPTS, SHARE, SEEDS, DRAWS = 128, 0.1, 5, 1000
LEARNED = 0.9
"""A seed whose model answers less than this of any task does not count: its circuits say nothing about answers."""

NAME, COLOR = 0, NAMES
THING = COLOR + COLORS
NUMBER = THING + THINGS
GAVE, TO, ASK, IS, NEXT, FOLLOWS = range(NUMBER + MODULUS, NUMBER + MODULUS + 6)
VOCABULARY = FOLLOWS + 1
TASKS = ("ioi", "colored_objects", "successor")

STAGES = (
    Stage("movers", "final", "", END),
    Stage("movers' queries", "q", "movers", END),
    Stage("their values", "kv", "movers' queries", "changed"),
)


def _distinct(batch: int, of: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, of, generator=generator).argsort(-1)[:, :count]


def _constant(batch: int, token: int) -> Tensor:
    return torch.full((batch, 1), token)


def draw(task: str, batch: int, generator: torch.Generator) -> PromptPairs:
    """Symbolic pairs.

    ``A B gave S to`` → the other name; ``c o c o c o ask o is`` → the colour; ``next n follows`` → n + 1. The corruption changes one token.
    """
    if task == "ioi":
        two = NAME + _distinct(batch, NAMES, 2, generator)
        which = torch.randint(2, (batch, 1), generator=generator)
        subject, other = two.gather(1, which), two.gather(1, 1 - which)
        sides = [torch.cat([two, _constant(batch, GAVE), s, _constant(batch, TO)], 1) for s in (subject, other)]
        answers, changed = (other[:, 0], subject[:, 0]), 3
    elif task == "colored_objects":
        colors, things = COLOR + _distinct(batch, COLORS, 3, generator), THING + _distinct(batch, THINGS, 3, generator)
        order = _distinct(batch, 3, 2, generator)
        listed = torch.stack([colors, things], -1).flatten(1)
        sides = [
            torch.cat([listed, _constant(batch, ASK), things.gather(1, order[:, i : i + 1]), _constant(batch, IS)], 1)
            for i in range(2)
        ]
        answers, changed = (colors.gather(1, order[:, :1])[:, 0], colors.gather(1, order[:, 1:])[:, 0]), 7
    else:
        two = _distinct(batch, MODULUS, 2, generator)
        sides = [
            torch.cat([_constant(batch, NEXT), NUMBER + two[:, i : i + 1], _constant(batch, FOLLOWS)], 1)
            for i in range(2)
        ]
        answers, changed = (NUMBER + (two[:, 0] + 1) % MODULUS, NUMBER + (two[:, 1] + 1) % MODULUS), 1
    places = {"changed": _constant(batch, changed), END: _constant(batch, sides[0].shape[1] - 1)}
    return PromptPairs(
        task, sides[0], sides[1], answers[0], answers[1], places, torch.stack(answers, 1), {"symbolic": True}
    )


def decoder(seed: int) -> PreTrainedModel:
    """A Llama of four layers with eight heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=DIM, intermediate_size=2 * DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS,
            num_key_value_heads=HEADS, max_position_embeddings=32, initializer_range=INIT,
        )
    )  # fmt: skip


def lesson(task: str, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training rows ``(batch, LONGEST)`` and which of their tokens are answers; Colored Objects asks for all three things in any order.

    ``copy`` shows random tokens twice: the way to look a token's neighbour up, without which Colored Objects is hardly learned.
    """
    if task == "copy":
        half = _distinct(batch, NUMBER, LONGEST // 2, generator)
        answer = torch.arange(LONGEST) > LONGEST // 2
        return torch.cat([half, half], 1), answer.expand(batch, -1)
    pairs = draw(task, batch, generator)
    ids = torch.cat([pairs.clean, pairs.correct[:, None]], 1)
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, -1] = True
    if task == "colored_objects":
        listed, first = ids[:, :6], (ids[:, 1:6:2] == ids[:, 7:8]).int().argmax(1, keepdim=True)
        turn = torch.randint(1, 3, (batch, 1), generator=generator)
        for step in (turn, 3 - turn):
            other = 2 * ((first + step) % 3)
            ask = [_constant(batch, ASK), listed.gather(1, other + 1), _constant(batch, IS), listed.gather(1, other)]
            ids = torch.cat([ids, *ask], 1)
            answer = torch.cat([answer, torch.tensor([False, False, False, True]).expand(batch, -1)], 1)
    return pad(ids, (0, LONGEST - ids.shape[1])), pad(answer, (0, LONGEST - ids.shape[1]))


def trained(seed: int) -> PreTrainedModel:
    """One decoder trained on all three tasks, and on copying."""
    model = decoder(seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = [lesson(task, count, generator) for task, count in BATCH.items()]
        ids, answer = (torch.cat([row[i] for row in rows]) for i in (0, 1))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return cross_entropy(logits[answer[:, 1:]], ids[:, 1:][answer[:, 1:]])

    fit(model, loss, TRAINING, lr=LR, seed=seed)
    return model


def circuits(model: PreTrainedModel, seed: int) -> dict[str, Circuit]:
    """The circuit of each task on fresh prompts."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    return {task: find_circuit(model, draw(task, PROMPTS, generator), stages=STAGES, share=SHARE) for task in TASKS}


def random_quantile(a: int, b: int, total: int, seed: int) -> float:
    """95th percentile of the overlap of random sets of these sizes."""
    pick = random.Random(seed)
    values = sorted(
        jaccard({(0, i) for i in pick.sample(range(total), a)}, {(0, i) for i in pick.sample(range(total), b)})
        for _ in range(DRAWS)
    )
    return values[int(0.95 * DRAWS)]


def one(seed: int) -> dict[str, Any]:
    """Overlaps of a seed's model."""
    found = circuits(trained(seed), seed)
    a, b, c = (found[task].heads for task in TASKS)
    shared, unrelated = jaccard(a, b), jaccard(a, c)
    learned = all(circuit.accuracy > LEARNED for circuit in found.values())
    limit = random_quantile(len(a), len(b), DEPTH * HEADS, seed)
    return {
        "accuracy": {task: found[task].accuracy for task in TASKS}, "sizes": [len(a), len(b), len(c)],
        "overlap": shared, "overlap_unrelated": unrelated, "random_q95": limit, "learned": learned,
        "met": learned and shared > unrelated and shared > limit,
        "curve": [{"share": o.share, "overlap": o.jaccard, "chance": o.chance.mean, "sizes": list(o.sizes)} for o in overlaps(found["ioi"], found["colored_objects"], SHARES)],
        "circuits": {task: found[task].to_json()["circuit"] for task in TASKS},
    }  # fmt: skip


def measure_symbolic(*, seeds: int = SEEDS, seed: int = 0, out: Path | None = None) -> dict[str, Any]:
    """Claim ``symbolic-tasks-share-heads``; several minutes."""
    runs = [one(seed + i) for i in range(seeds)]
    met = sum(run["met"] for run in runs)
    above = sum(run["learned"] and run["overlap"] > run["overlap_unrelated"] for run in runs)
    rows = {name: summary([run[name] for run in runs]) for name in ("overlap", "overlap_unrelated", "random_q95")}
    numbers = {
        "ours": f"overlap {rows['overlap']['mean']:.2f} with Colored Objects, {rows['overlap_unrelated']['mean']:.2f} with successor, random 95th percentile "
        f"{rows['random_q95']['mean']:.2f}; criterion met in {met} of {seeds} seeds; all tasks learned in {sum(run['learned'] for run in runs)}",
        **rows, "met": met, "seeds": seeds, "above_unrelated": above, "share_per_stage": SHARE, "steps": TRAINING, "prompts": PROMPTS, "per_seed": runs,
    }  # fmt: skip
    needed = math.ceil(0.8 * seeds)
    verdict = "reproduced" if met >= needed else "direction holds" if above >= needed else "not reproduced"
    return write_result("circuit_reuse", "symbolic-tasks-share-heads", verdict, numbers, seed=seed, out=out)


if __name__ == "__main__":
    run_measures(__doc__, [measure_symbolic], brief=True)
