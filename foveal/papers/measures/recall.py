"""Small models that really learn key–value retrieval in about a minute, shared by measures that need a trained one.

Their attention is shifted by a token (``models.shift``). A curriculum adds pairs and fill tokens up to the length that is measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.synthetic import Task, key_values, key_values_vocabulary
from ...models import DecoderLM, DiffusionLM, shifted_factory
from ...recipes.fit import fit, stage_at

DIM, DEPTH, HEADS = 128, 4, 4
LENGTH, ANSWER = 512, 64
"""Tokens of the sequences that are measured, and how many of them are the answer: asked keys and their values in turn."""
PAIRS, ASKED = 64, ANSWER // 2
LR = 2e-3


@dataclass(frozen=True)
class Stage:
    """Part of the curriculum: ``steps`` batches of about ``tokens`` tokens, ``pairs`` pairs spread over sequences of ``length``."""

    steps: int
    pairs: int
    length: int
    tokens: int = 2048


STAGES = (
    Stage(200, 4, 17),
    Stage(30, 8, 49),
    Stage(30, 12, 97),
    Stage(30, 18, 145),
    Stage(30, 27, 225),
    Stage(30, 40, 345),
    Stage(80, PAIRS, LENGTH, 3072),
)


def batch(stage: Stage, generator: torch.Generator) -> Task:
    """A batch of one stage."""
    rows = max(1, stage.tokens // stage.length)
    return key_values(rows, stage.pairs, min(stage.pairs, ASKED), generator, length=stage.length)


def stage_of(step: int, stages: tuple[Stage, ...]) -> Stage:
    """The stage that a step belongs to."""
    return stages[stage_at(step, [stage.steps for stage in stages])]


@functools.lru_cache(maxsize=8)
def diffusion_model(seed: int) -> DiffusionLM:
    """A masked-diffusion model that finds values; trained by its own loss without the weight 1/t, which is noisy in short runs."""
    model = DiffusionLM(key_values_vocabulary(), DIM, DEPTH, HEADS, attention=shifted_factory(DIM, HEADS), seed=seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        stage = stage_of(step, STAGES)
        task = batch(stage, generator)
        least = 0.5 if stage.length < LENGTH else 0.0  # many masks at first: more to learn from
        share = least + (1 - least) * torch.rand(task.ids.shape[0], 1, generator=generator)
        masked = (torch.rand(task.ids.shape, generator=generator) < share) & task.answer
        masked[0] |= task.answer[0]  # never a batch without a mask
        logits = model(torch.where(masked, model.mask, task.ids))
        return cross_entropy(logits[masked], task.ids[masked])

    fit(model, loss, sum(stage.steps for stage in STAGES), lr=LR, seed=seed)
    return model


@functools.lru_cache(maxsize=8)
def causal_model(seed: int) -> DecoderLM:
    """A causal model that finds values, by next-token prediction of the answers."""
    model = DecoderLM(key_values_vocabulary(), DIM, DEPTH, HEADS, attention=shifted_factory(DIM, HEADS), seed=seed)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        task = batch(stage_of(step, STAGES), generator)
        return model.loss(task.ids, task.answer)

    fit(model, loss, sum(stage.steps for stage in STAGES), lr=LR, seed=seed)
    return model


def held_out(rows: int, seed: int) -> Task:
    """Sequences of the measured length that no training step saw: another generator, and random pairs anyway."""
    return key_values(rows, PAIRS, ASKED, torch.Generator().manual_seed(1_000_003 + seed), length=LENGTH)
