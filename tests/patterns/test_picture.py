"""Pictures of patterns: every cell counts what the layout lists, for every kind of layout."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.errors import ConfigError
from foveal.core.layouts import Groups
from foveal.patterns import Pattern
from foveal.patterns.picture import cells, draw, example_tensors
from foveal.patterns.reuse import Reuse

from ..matrix import PATTERNS
from ..support import Host, listed

TOKENS, HEADS = 70, 2


class Pairs(Pattern):
    """Groups of ten neighbouring tokens, all heads alike."""

    registered_name: ClassVar[str] = "test_pairs"

    def select(self, q, k, ctx, state=None):
        n = ctx.base.q_len
        cu = torch.arange(0, n + 10, 10).clamp(max=n)
        return Groups(torch.arange(n), cu, torch.arange(n), cu), state


def brute(pattern: Pattern, causal: bool) -> Tensor:
    """``(H, N, N)`` bool, from the lists that the layout names."""
    host = Host(TOKENS, TOKENS, causal=causal)
    q, k = example_tensors(TOKENS, HEADS, 0)
    layout, _ = pattern.select(q, k, SelectContext(base=BaseMask.build(TOKENS, TOKENS, causal=causal)), None)
    kept = torch.zeros(HEADS, TOKENS, TOKENS, dtype=torch.bool)
    for h in range(HEADS):
        for i in range(TOKENS):
            for keys in listed(layout, 0, h, i, (HEADS, HEADS, TOKENS, TOKENS)):
                kept[h, i, torch.as_tensor(list(keys), dtype=torch.long)] = True
    return kept & torch.from_numpy(host.dense())


DRAWN = [name for name, row in PATTERNS.items() if not isinstance(row.pattern, Reuse)]
"""Patterns that choose by themselves."""


@pytest.mark.parametrize("name", [*DRAWN, "pairs"])
def test_every_cell_counts_what_the_layout_lists(name: str) -> None:
    pattern = Pairs() if name == "pairs" else PATTERNS[name].pattern
    expected = brute(pattern, causal=True)
    got = draw(pattern, TOKENS, rows=TOKENS, columns=TOKENS, heads=HEADS, query=40)
    assert torch.equal(got.shares > 0, expected) and bool((got.shares.eq(0) | got.shares.eq(1)).all())
    assert got.query is not None and torch.equal(got.query, expected[:, 40])
    coarse = draw(pattern, TOKENS, rows=7, columns=5, heads=HEADS).shares
    assert torch.allclose(coarse, expected.double().view(HEADS, 7, 10, 5, 14).mean((2, 4)))
    assert got.density.pairs == int(expected.sum())


def test_a_bidirectional_model_has_no_causal_mask() -> None:
    shares = draw(PATTERNS["sliding_window"].pattern, TOKENS, rows=TOKENS, columns=TOKENS, causal=False).shares
    assert shares[0, 0, 36] == 1 and shares[0, 0, 37] == 0


def test_cells_are_tokens_while_they_fit_and_equal_blocks_beyond() -> None:
    assert [cells(n, 64) for n in (1, 64, 65, 128, 129, 1000)] == [1, 64, 33, 64, 43, 63]


def test_examples_depend_on_the_seed_alone() -> None:
    one, same, other = (example_tensors(50, 2, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_pattern_that_needs_an_earlier_layer_says_so() -> None:
    with pytest.raises(ConfigError, match="no earlier layer"):
        draw(Reuse(), TOKENS, rows=TOKENS, columns=TOKENS)
