"""What a policy kept, block of rows by block of rows, against every pair of the reference."""

from __future__ import annotations

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.core.layouts import BlockMask, Groups, KeySelection
from foveal.kernels.call import AttentionCall
from foveal.kernels.reference import visible_pairs
from foveal.lens.kept import Kept
from foveal.patterns import BlockTopK, MoBA, Pattern, SlidingWindow, TokenTopK

N, HEADS, KV = 150, 4, 2
PATTERNS: dict[str, Pattern] = {
    "window": SlidingWindow(window=20, sinks=2),
    "blocks per head": BlockTopK(Budget(tokens=40), q_block=16, kv_block=8, sinks=2),
    "blocks for all heads": BlockTopK(Budget(density=0.4), q_block=32, kv_block=16, sinks=0, per_head=False),
    "tokens": TokenTopK(Budget(tokens=20), sinks=2, local=3),
    "tokens of a block": TokenTopK(Budget(density=0.3), q_block=16, sinks=0, per_head=True),
    "groups": MoBA(block=16, top_k=3),
}


def call(pads: bool) -> AttentionCall:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, HEADS, N, 8, generator=g) * 2, torch.randn(2, KV, N, 8, generator=g)
    valid = (torch.arange(N) >= torch.tensor([[0], [40]])) if pads else None
    return AttentionCall(q, k, k, None, BaseMask.build(N, N, causal=True, valid=valid), 8**-0.5)


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_the_reference(name: str, pads: bool) -> None:
    c = call(pads)
    layout, _ = PATTERNS[name].select(c.q, c.k, SelectContext(base=c.base))
    assert isinstance(layout, (BlockMask, KeySelection, Groups))
    want = visible_pairs(c.replace(layout=layout))
    kept = Kept([(tuple(range(HEADS)), layout)], c.base)
    assert not kept.everything
    for b in range(2):
        for heads in (slice(0, 2), slice(2, 4)):
            for rows, keys in (
                (slice(0, 37), slice(0, 37)),
                (slice(100, 150), slice(0, 150)),
                (slice(63, 65), slice(30, 65)),
            ):
                assert torch.equal(kept.block(b, heads, rows, keys), want[b, heads, rows, keys])


def test_heads_with_layouts_of_their_own() -> None:
    c = call(False)
    q, k = c.q[:, [0, 2, 3]], c.k[:, [0, 1, 1]]
    ctx = SelectContext(base=c.base)
    some, _ = TokenTopK(Budget(tokens=12)).select(q, k, ctx)
    other, _ = SlidingWindow(window=9).select(c.q[:, [1]], c.k[:, [0]], ctx)
    part = visible_pairs(c.replace(q=q, k=k, layout=some))
    alone = visible_pairs(c.replace(q=c.q[:, [1]], k=c.k[:, [0]], layout=other))
    want = torch.stack([part[:, 0], alone[:, 0], part[:, 1], part[:, 2]], 1)
    kept = Kept([((0, 2, 3), some), ((1,), other)], c.base)
    for heads in (slice(0, 2), slice(2, 4)):
        assert torch.equal(kept.block(1, heads, slice(40, 90), slice(0, 90)), want[1, heads, 40:90, :90])


def test_nothing_dropped() -> None:
    c = call(False)
    kept = Kept([((0, 1), None), ((2, 3), None)], c.base)
    assert kept.everything
    assert torch.equal(kept.block(0, slice(0, 2), slice(3, 9), slice(0, 9))[1], c.base.dense()[0, 3:9, :9])
