"""Two layouts in one batch: every row keeps exactly what its own layout keeps."""

from __future__ import annotations

import itertools

import pytest
import torch

from foveal.core.budget import Budget
from foveal.core.errors import UnsupportedError
from foveal.core.layouts import Groups, KeySelection
from foveal.patterns import Dense, MoBA, SlidingWindow, TokenTopK, XAttention
from foveal.patterns.by_rows import by_rows
from tests.support import Host, assert_close, context, run, tensors

BLOCKS = (
    Dense(),
    SlidingWindow(5, 2),
    SlidingWindow(130, 3, block=13),
    XAttention(Budget(mass=0.5), stride=4, block=128),
)
LISTS = (Dense(), SlidingWindow(5, 2), TokenTopK(Budget(tokens=9)))
PREFILL = [Host(n, n, pads=((0, 0), (7, 0), (0, 0))) for n in (40, 127, 128, 129, 200)]
DECODE = Host(1, 50, pads=((0, 0), (9, 0), (0, 0)), after=49)


def check(one, other, host, heads=4, impl="gather"):
    q, k, v = tensors(host, heads=heads)
    a, b = (p.select(q, k, context(host))[0] for p in (one, other))
    outs = [run(q, k, v, layout, host)[0] for layout in (a, b)]
    for first in ([True, False, True], [False, False, True], [True, True, True]):
        rows = torch.tensor(first)
        got = run(q, k, v, by_rows(rows, a, b, host.base()), host, impl)[0]
        assert_close(got, torch.where(rows[:, None, None, None], outs[0], outs[1]), 1e-12)


@pytest.mark.parametrize("host", PREFILL, ids=[str(h.q_len) for h in PREFILL])
@pytest.mark.parametrize("impl", ["gather", "reference"])
def test_block_masks(host, impl):
    for one, other in itertools.product(BLOCKS, repeat=2):
        check(one, other, host, impl=impl)


def test_lists():
    for one, other in itertools.product(LISTS, repeat=2):
        check(one, other, DECODE)


def test_dense_beside_dense_is_dense():
    assert by_rows(torch.tensor([True, False]), None, None, Host(4, 4).base()) is None


def test_kinds_that_cannot_be_joined_are_refused():
    host = Host(64, 64, pads=((0, 0), (0, 0)))
    q, k, _ = tensors(host)
    groups = MoBA(16, 1).select(q, k, context(host))[0]
    lists = TokenTopK(Budget(tokens=9)).select(q, k, context(host))[0]
    blocks = SlidingWindow(5).select(q, k, context(host))[0]
    small = XAttention(Budget(mass=0.5), stride=4, block=16).select(q, k, context(host))[0]
    assert isinstance(groups, Groups) and isinstance(lists, KeySelection)
    limited = KeySelection(lists.index, lists.block_size, torch.zeros(1, 64, dtype=torch.long))
    rows = torch.tensor([True, False])
    for a, b in ((groups, None), (lists, blocks), (blocks, small), (limited, None)):
        with pytest.raises(UnsupportedError, match="routed differently"):
            by_rows(rows, a, b, host.base())
    three = KeySelection(torch.zeros(1, 3, 1, 1, dtype=torch.long), 64)
    two = KeySelection(torch.zeros(1, 2, 1, 1, dtype=torch.long), 64)
    with pytest.raises(UnsupportedError, match="for 3 and 2 heads"):
        by_rows(rows, three, two, host.base())
