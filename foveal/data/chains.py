"""Chained modular arithmetic with its working: numbered operations told in any order, carried out one after another.

A question is ``label operation … ␟ start``, its answer one line ``label operation result`` per operation, in the order of the labels.
Every token of the answer is determined, so a sampled answer is right or wrong as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .synthetic import FIRST, SEPARATOR, Task

LINE = 3
"""Tokens of a line of the answer: label, operation, result."""


@dataclass(frozen=True, eq=False)
class Chains(Task):
    """A batch of questions with their answers.

    Attributes:
        prompt: tokens of each question; the answer is the rest.
    """

    prompt: int

    @property
    def question(self) -> Tensor:
        """``(B, prompt)`` tokens."""
        return self.ids[:, : self.prompt]

    def right(self, answers: Tensor) -> Tensor:
        """``(B,)`` bool: which of the answers ``(B, LINE · steps)`` are right in every token."""
        return (answers == self.ids[:, self.prompt :]).all(1)


def vocabulary(modulus: int, most: int) -> int:
    """Tokens that :func:`chains` uses: fill, separator, ``most`` labels, the values, additions and multiplications."""
    return FIRST + most + modulus + 2 * modulus - 1


def chains(batch: int, steps: int, generator: torch.Generator, *, modulus: int = 11, most: int = 32) -> Chains:
    """Questions of ``steps`` operations on numbers modulo ``modulus``: adding 0 … modulus−1, or multiplying by 1 … modulus−1.

    Args:
        batch: rows. steps: operations in each; ``(2 + LINE) · steps + 2`` tokens. generator: draws everything.
        modulus: best a prime, so that no multiplication forgets what came before. most: labels in the vocabulary.

    Raises:
        ConfigError: steps not from 1 to ``most``, or a modulus below 2.
    """
    if not 1 <= steps <= most or modulus < 2:
        raise ConfigError(
            f"chains has steps={steps}, most={most}, modulus={modulus}; expected 1 ≤ steps ≤ most and a modulus of at least 2."
        )
    operation = torch.randint(2 * modulus - 1, (batch, steps), generator=generator)
    value = torch.randint(modulus, (batch,), generator=generator)
    results = [value]
    for step in range(steps):
        results.append(apply(operation[:, step], results[-1], modulus))
    first_value = FIRST + most
    label = (torch.arange(steps) + FIRST).expand(batch, -1)
    told = operation + first_value + modulus
    order = torch.rand(batch, steps, generator=generator).argsort(1)
    listed = torch.stack([label.gather(1, order), told.gather(1, order)], -1).flatten(1)
    begin = torch.stack([torch.full((batch,), SEPARATOR), first_value + value], 1)
    lines = torch.stack([label, told, first_value + torch.stack(results[1:], 1)], -1).flatten(1)
    ids = torch.cat([listed, begin, lines], 1)
    prompt = 2 * steps + 2
    return Chains(ids, (torch.arange(ids.shape[1]) >= prompt).expand(batch, -1), prompt)


def apply(operation: Tensor, value: Tensor, modulus: int) -> Tensor:
    """The results of operations by number: the first ``modulus`` add their number, the others multiply by 1, 2, …"""
    return torch.where(operation < modulus, value + operation, value * (operation - modulus + 1)) % modulus
