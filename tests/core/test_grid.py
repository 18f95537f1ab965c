"""Windows along one axis: the definition written out as a loop, its inverse, and tile order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import ConfigError, ShapeError
from foveal.core.grid import Axis, query_spans, window_spans
from foveal.core.tiles import Tiling, product_sum, row_major

from ..neighbors import axes, seen_along

SHORT = [(n, w, s) for n in range(1, 26) for w in range(1, n + 1) for s in range(1, w + 1)]


@pytest.mark.parametrize("causal", [False, True])
def test_windows_are_the_definition_and_rise(causal: bool) -> None:
    for n, w, s in SHORT:
        start, end = window_spans(n, w, s, causal)
        for i in range(n):
            assert list(range(int(start[i]), int(end[i]))) == seen_along(Axis(n, w, s, 1, causal), i)
        assert (start.diff() >= 0).all() and (end.diff() >= 0).all()
        assert (end > start).all(), "every query sees a key"
        if not causal:
            assert (end - start == w).all(), "always exactly w keys"


@pytest.mark.parametrize("causal", [False, True])
def test_inverse_window_equals_the_transposed_mask(causal: bool) -> None:
    for n, w, s in SHORT:
        start, end = window_spans(n, w, s, causal)
        j = torch.arange(n)
        mask = (j >= start[:, None]) & (j < end[:, None])
        lo, hi = query_spans(n, w, s, causal)
        assert torch.equal(mask.T, (j >= lo[:, None]) & (j < hi[:, None])), (n, w, s)


def test_more_queries_than_the_window_see_a_key_near_a_border() -> None:
    lo, hi = query_spans(40, 8)
    assert int((hi - lo).max()) == 12


@given(axes(1, 40))
def test_codes_keys_and_mask_agree_with_dilation(one: tuple[Axis, ...]) -> None:
    axis = one[0]
    mask, keys = axis.mask(), axis.keys()
    for x in range(axis.length):
        expected = seen_along(axis, x)
        assert mask[x].nonzero()[:, 0].tolist() == expected
        assert keys[x][keys[x] >= 0].tolist() == expected
    for g in range(axis.dilation):
        lo, hi = axis.queries(g)
        inside = mask[g :: axis.dilation, g :: axis.dilation]
        assert torch.equal(inside.sum(0), hi - lo)


@given(axes(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_tile_kinds_equal_tiles_of_the_mask(one: tuple[Axis, ...], q_tile: int, kv_tile: int) -> None:
    axis = one[0]
    touches, covers = axis.tile_kinds(q_tile, kv_tile)
    orders = [Tiling((axis.length,), (t,), (axis.dilation,)) for t in (q_tile, kv_tile)]
    at = [o.permute(torch.arange(1, axis.length + 1)[:, None])[:, 0].view(-1, t) - 1 for o, t in zip(orders, (q_tile, kv_tile), strict=True)]  # fmt: skip
    mask = axis.mask()
    for u, rows in enumerate(at[0]):
        for c, columns in enumerate(at[1]):
            pairs = mask[rows[rows >= 0]][:, columns[columns >= 0]]
            assert bool(touches[u, c]) == bool(pairs.any())
            whole = pairs.numel() > 0 and bool(pairs.all()) and bool((columns >= 0).all())
            assert bool(covers[u, c]) == whole


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1), "grid has an axis of 0 tokens"),
        ((8, 9), "window is 9; expected 1 to 8"),
        ((8, 5, 1, 2), "window is 5; expected 1 to 4, because the axis has 8 tokens and dilation is 2"),
        ((8, 4, 5), "stride is 5; expected 1 to 4"),
        ((8, 4, 0), "stride is 0"),
        ((8, 1, 1, 9), "dilation is 9; expected 1 to 8"),
    ],
)
def test_values_that_do_not_fit_are_named(values: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Axis(*values)


@given(st.data())
def test_tile_order_keeps_tiles_together_and_comes_back(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    size = st.lists(st.integers(1, {1: 40, 2: 9, 3: 5}[rank]), min_size=rank, max_size=rank).map(tuple)
    few = st.lists(st.integers(1, 4), min_size=rank, max_size=rank).map(tuple)
    order = Tiling(data.draw(size), data.draw(few), data.draw(few))
    tokens = torch.arange(1, order.tokens + 1)
    slots = order.permute(tokens[None, :, None].expand(2, -1, 3))
    assert slots.shape == (2, order.length, 3)
    assert torch.equal(order.restore(slots)[1, :, 2], tokens)
    assert int((slots[0, :, 0] > 0).sum()) == order.tokens
    where = product_sum([offset[:, None] for offset in order.offsets()])[:, 0]
    assert torch.equal(slots[0, where, 0], tokens)
    per_tile = torch.tensor(order.tile).prod()
    for tile in slots[0, :, 0].view(-1, int(per_tile)):
        real = tile[tile > 0] - 1
        for step, n, d, t in zip(row_major(order.grid), order.grid, order.dilation, order.tile, strict=True):
            x = torch.div(real, int(step[1]) if n > 1 else 1, rounding_mode="floor") % n if n > 1 else real * 0
            assert (x % d == x[:1] % d).all() and (x // d // t == x[:1] // d // t).all()


def test_a_single_axis_needs_no_copy() -> None:
    x = torch.randn(2, 3, 64, 8)
    order = Tiling((64,), (16,), (1,))
    assert order.permute(x) is x and order.restore(x) is x
    assert not Tiling((60,), (16,), (1,)).trivial


def test_gradients_flow_through_the_order() -> None:
    order = Tiling((5, 7), (2, 3), (1, 2))
    x = torch.randn(35, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order.permute, x)
    y = torch.randn(order.length, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(order.restore, y)


def test_orders_refuse_other_lengths() -> None:
    order = Tiling((4, 4), (3, 3), (1, 1))
    with pytest.raises(ShapeError, match=r"x has 15 tokens in dimension 0; expected 16, the grid \(4, 4\)"):
        order.permute(torch.zeros(15, 1))
    with pytest.raises(ShapeError, match=r"x has 16 slots in dimension 0; expected 36"):
        order.restore(torch.zeros(16, 1))
    with pytest.raises(ConfigError, match=r"Tiling.tile is \(3,\); expected 2 numbers"):
        Tiling((4, 4), (3,), (1, 1))
