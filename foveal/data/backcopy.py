"""A language in which attention is of use at a few tokens alone: a bigram chain that copies back after triggers.

Whatever a softmax head does elsewhere is of no use, so it must put its attention somewhere: the smallest laboratory for attention
sinks (spec of Gated Attention, arXiv 2505.06708).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .synthetic import Task


@dataclass(frozen=True, eq=False)
class BackCopy:
    """The language. Tokens 0 … V−1 are words, the first ``triggers`` of them triggers; V is the start token.

    Attributes:
        table: ``(V, V)`` transition probabilities. triggers: after one of them the next token is the one before it.
    """

    table: Tensor
    triggers: int = 3

    @classmethod
    def make(cls, words: int = 64, triggers: int = 3, seed: int = 0) -> BackCopy:
        """Rows are softmax(2.5·N(0, 1)), with 0.04 more on every trigger, normalised again."""
        g = torch.Generator().manual_seed(seed)
        table = torch.softmax(2.5 * torch.randn(words, words, generator=g), -1)
        table[:, :triggers] += 0.04
        return cls(table / table.sum(-1, keepdim=True), triggers)

    @property
    def vocab_size(self) -> int:
        return self.table.shape[0] + 1

    def draw(self, batch: int, length: int, generator: torch.Generator) -> Task:
        """A batch whose ``answer`` marks the copied tokens; position 0 is the start token, position 1 no trigger."""
        words = self.table.shape[0]
        ids = torch.full((batch, length), words)
        ids[:, 1] = torch.randint(self.triggers, words, (batch,), generator=generator)
        for t in range(2, length):
            drawn = torch.multinomial(self.table[ids[:, t - 1]], 1, generator=generator)[:, 0]
            ids[:, t] = torch.where(ids[:, t - 1] < self.triggers, ids[:, t - 2], drawn)
        answer = torch.zeros(batch, length, dtype=torch.bool)
        answer[:, 1:] = ids[:, :-1] < self.triggers
        return Task(ids, answer)
