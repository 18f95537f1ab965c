"""Facts hidden in a text, and questions about them: what the retrieval tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core.errors import ConfigError
from ..data.needle import frame, plant, question
from ..data.text import tokens
from .base import Ask, Material, Quiz

LEAST_TEXT = 128
"""Tokens of ordinary text that must be left in a context, so that depths mean something."""


@dataclass(frozen=True)
class Fact:
    """A sentence, and how deep it goes into the context: 0 is the beginning, 1 the end."""

    sentence: str
    depth: float


@dataclass(frozen=True)
class Wanted:
    """A question: for a chat its words, and the beginning of the reply that the right answer and the wrong ones continue."""

    question: str
    begun: str
    answer: str
    others: tuple[str, ...]
    at: dict[str, float]


def hide(
    material: Material, key: str, length: int, facts: Sequence[Fact], wanted: Sequence[Wanted], generator: torch.Generator
) -> Quiz:  # fmt: skip
    """A context of ordinary text with the facts between its sentences, and the questions.

    Args:
        key: of the quiz. length: tokens of the context with the longest question and answer, never exceeded.

    Raises:
        ConfigError: ``length`` leaves no room for text. DataError: the text is too short.
    """
    tokenizer = material.tokenizer
    before, after = frame(tokenizer, [(w.question, w.begun) for w in wanted], material.chat)
    pieces = [tokens(tokenizer, f" {fact.sentence}") for fact in facts]
    asks = []
    for text, w in zip(after, wanted, strict=True):
        ids, (answer, *others) = question(tokenizer, text, (w.answer, *w.others))
        asks.append(Ask(ids, answer, tuple(others), w.at))
    taken = len(before) + sum(map(len, pieces)) + max(len(a.ids) + a.longest for a in asks)
    if length - taken < LEAST_TEXT:
        raise ConfigError(
            f"a context of {length} tokens has no room for {key.split('.')[0]}: its {len(facts)} facts, a question and an answer take "
            f"{taken}, and {LEAST_TEXT} of text are needed; pass a longer --context, or other --tasks."
        )
    hay = material.excerpt(length - taken, generator)
    planted, _ = plant(tokenizer, hay, pieces, [fact.depth for fact in facts])
    return Quiz(key, torch.cat([before, planted]), tuple(asks))


def codes(count: int, generator: torch.Generator) -> list[str]:
    """So many different numbers of five digits."""
    return [str(int(c) + 10_000) for c in torch.randperm(90_000, generator=generator)[:count]]


def sample(count: int, total: int, generator: torch.Generator) -> list[int]:
    """So many different numbers below ``total``, in random order."""
    return [int(i) for i in torch.randperm(total, generator=generator)[:count]]


def capital(text: str) -> str:
    """With a capital first letter."""
    return text[:1].upper() + text[1:]
