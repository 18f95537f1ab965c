"""Pictures for small language models: a grid of symbols as tokens, and a question about one cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Grids:
    """``ids`` ``(B, cells + 1)``: the cells' symbols, then the question; ``answer`` ``(B,)`` the symbol of the cell asked for.

    Tokens: symbols from 0, then one question per cell, then :attr:`GridTask.ask`, after which the answer is read.
    """

    ids: Tensor
    answer: Tensor


@dataclass(frozen=True)
class GridTask:
    """Sizes of the task."""

    cells: int = 6
    symbols: int = 8

    @property
    def ask(self) -> int:
        """The token after which the answer is read."""
        return self.symbols + self.cells

    @property
    def vocab_size(self) -> int:
        return self.symbols + self.cells + 1

    def draw(self, batch: int, generator: torch.Generator) -> Grids:
        """A batch."""
        picture = torch.randint(self.symbols, (batch, self.cells), generator=generator)
        cell = torch.randint(self.cells, (batch, 1), generator=generator)
        return Grids(torch.cat([picture, self.symbols + cell], 1), picture.gather(1, cell)[:, 0])
