"""Neighborhood: layouts against the definition, in every order and form; the identities of GNA and FNA by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import foveal
from foveal.core.base_mask import FULL, BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.core.errors import ConfigError, FovealError, ShapeError, UnsupportedError
from foveal.core.layouts import BlockMask, Groups, KeySelection, block_mask_kinds
from foveal.kernels import flex
from foveal.kernels.call import AttentionCall
from foveal.kernels.reference import visible_pairs
from foveal.patterns import Neighborhood

from ..neighbors import axes, dense, mask
from ..support import assert_close


def of(one: Any, **fields: Any) -> Neighborhood:
    """The pattern of these axes."""
    each = ([getattr(axis, name) for axis in one] for name in ("length", "window", "stride", "dilation", "causal"))
    return Neighborhood(*map(tuple, each), **fields)


def layout_of(pattern: Neighborhood, q_len: int, kv_len: int, causal: bool = False, batch: int = 2) -> Any:
    base = BaseMask.build(q_len, kv_len, causal=causal)
    q, k = torch.zeros(batch, 2, q_len, 4), torch.zeros(batch, 2, kv_len, 4)
    return pattern.select(q, k, SelectContext(base))[0]


def pairs(layout: Any, q_len: int, kv_len: int, batch: int = 2) -> Tensor:
    """``(q_len, kv_len)`` visible pairs; all batch rows and heads must agree."""
    base = BaseMask.build(q_len, kv_len, causal=False)
    if isinstance(layout, Groups):
        layout.validate(batch, 2, 2, q_len, kv_len)
        found = torch.zeros(batch, q_len, kv_len, dtype=torch.bool)
        for g in range(layout.cu_q.numel() - 1):
            a = layout.q_index[layout.cu_q[g] : layout.cu_q[g + 1]]
            b = layout.k_index[layout.cu_k[g] : layout.cu_k[g + 1]]
            assert (a // q_len == b[0] // kv_len).all()
            found[a[:, None] // q_len, a[:, None] % q_len, b % kv_len] = True
        found = found[:, None]
    else:
        if isinstance(layout, KeySelection):
            layout.validate(batch, 2, 2, q_len, kv_len)
        q, k = torch.zeros(batch, 2, q_len, 4), torch.zeros(batch, 2, kv_len, 4)
        found = visible_pairs(AttentionCall(q, k, k, layout, base, 1.0))
    assert (found == found[:1, :1]).all()
    return found[0, 0]


def wanted(pattern: Neighborhood, queries: int) -> Tensor:
    """The definition over grid tokens and ``extra`` keys; ``queries`` extra queries see everything."""
    inside = mask(pattern.axes())
    n, m = inside.shape[0], pattern.extra
    full = torch.ones(n + m, n + m, dtype=torch.bool)
    full[:n, :n] = inside
    return full[: n + queries]


@given(axes(), st.sampled_from([0, 0, 3, 130]), st.booleans(), st.sampled_from(["auto", "blocks", "lists"]))
def test_row_major_layouts_are_the_definition(one: Any, extra: int, queries: bool, how: Any) -> None:
    pattern = of(one, extra=extra, layout=how)
    want = wanted(pattern, extra if queries else 0)
    try:
        layout = layout_of(pattern, *want.shape)
    except UnsupportedError as error:
        assert how == "lists" and "queries that share a window" in str(error)
        return
    assert torch.equal(pairs(layout, *want.shape), want)


@given(axes(), st.data())
def test_tile_order_layouts_are_the_definition(one: Any, data: st.DataObject) -> None:
    rank, extra = len(one), data.draw(st.sampled_from([0, 0, 3]))
    tile = st.lists(st.integers(1, 5), min_size=rank, max_size=rank).map(tuple)
    q_tile = data.draw(st.one_of(tile, st.just(tuple(axis.stride for axis in one))))
    how = data.draw(st.sampled_from(["auto", "blocks", "lists"]))
    pattern = of(one, extra=extra, layout=how, q_tile=q_tile, kv_tile=data.draw(tile))
    queries = extra if data.draw(st.booleans()) else 0
    full = wanted(pattern, queries)
    n = math.prod(axis.length for axis in one)
    numbers = torch.arange(1, n + 1)[:, None]
    q_at, k_at = (order.permute(numbers)[:, 0] - 1 for order in pattern.tilings())
    outside = n + torch.arange(extra)
    q_at, k_at = torch.cat([q_at, outside[:queries]]), torch.cat([k_at, outside])
    want = full[q_at.clamp(min=0)][:, k_at.clamp(min=0)] & (q_at >= 0)[:, None] & (k_at >= 0)
    try:
        layout = layout_of(pattern, *want.shape)
    except UnsupportedError as error:
        assert how == "lists" and "queries that share a window" in str(error)
        return
    assert torch.equal(pairs(layout, *want.shape), want)


@given(axes(causal=False), st.integers(0, 2**31), st.integers(1, 2))
def test_every_implementation_runs_forward_and_backward(one: Any, seed: int, kv_heads: int) -> None:
    pattern, make = of(one), torch.Generator().manual_seed(seed)
    n = math.prod(axis.length for axis in one)
    leaves = [torch.randn(2, h, n, d, generator=make, dtype=torch.float64).requires_grad_() for h, d in ((2, 4), (kv_heads, 4), (kv_heads, 3))]  # fmt: skip
    expected, lse = dense(*leaves, mask(pattern.axes()))
    weight = torch.randn(expected.shape, generator=make, dtype=torch.float64)
    gradients = torch.autograd.grad((expected * weight).sum() + lse.sum(), leaves)
    for how in ("auto", "blocks"):
        for impl in ("reference", "gather"):
            out, got_lse = foveal.attention(
                *leaves,
                dataclasses.replace(pattern, layout=how),
                impl=impl,
                return_lse=True,  # type: ignore[arg-type]
            )
            assert_close(out, expected)
            assert_close(got_lse, lse)
            got = torch.autograd.grad((out * weight).sum() + got_lse.sum(), leaves)
            for a, b in zip(got, gradients, strict=True):
                assert_close(a, b)


@pytest.mark.skipif(flex.unavailable() is not None, reason=str(flex.unavailable()))
@pytest.mark.parametrize(
    "pattern",
    [
        Neighborhood((12, 14), (5, 4), (2, 1), (1, 2), (False, True), layout="blocks"),
        Neighborhood((16, 16), 8, 4, q_tile=(4, 4), kv_tile=(2, 8), extra=16),
    ],
    ids=["rows", "tiles"],
)
def test_flex_runs_the_blocks(pattern: Neighborhood) -> None:
    pattern = dataclasses.replace(pattern, layout="blocks")
    n = math.prod(pattern.grid or ()) + pattern.extra
    q, k, v = (torch.randn(1, 2, n, 32) for _ in range(3))
    with torch.no_grad():
        got = foveal.attention(q, k, v, pattern, impl="flex")
        assert_close(got, foveal.attention(q.double(), k.double(), v.double(), pattern, impl="reference").float(), 1e-5)


# --- the sheets' identities ----------------------------------------------------------------------------------------


def visible(pattern: Neighborhood) -> Tensor:
    n = math.prod(pattern.grid or ())
    return pairs(layout_of(pattern, n, n), n, n)


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_a_window_as_large_as_the_grid_is_full_attention(stride: int) -> None:
    assert layout_of(Neighborhood((5, 6), (5, 6), stride), 30, 30) is None
    q, k, v = (torch.randn(1, 2, 30, 8) for _ in range(3))
    out = foveal.attention(q, k, v, Neighborhood((5, 6), (5, 6), stride))
    assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v), 1e-6)
    causal = Neighborhood((30,), 30, stride, causal=True)
    assert torch.equal(visible(causal), torch.ones(30, 30).tril() > 0), "1-D causal with a whole window is plain causal"
    assert layout_of(causal, 30, 30, causal=True) is None


def test_stride_equal_to_window_is_attention_in_blocks() -> None:
    block = torch.arange(12) // 4
    same = block[:, None] == block
    both = (same[:, None, :, None] & same[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    assert torch.equal(visible(Neighborhood.blocked((12, 12), 4)), both)
    assert torch.equal(visible(Neighborhood.blocked((12,), 4, causal=True)), same & (torch.ones(12, 12).tril() > 0))


def test_stride_one_and_odd_window_is_the_classic_neighborhood() -> None:
    rows = visible(Neighborhood.sliding((7, 9), (3, 5)))
    assert (rows.sum(-1) == 15).all(), "exactly w keys, at corners too"
    corner = rows[0].nonzero()[:, 0]
    assert corner.tolist() == [y * 9 + x for y in range(3) for x in range(5)]
    centre = rows[3 * 9 + 4].nonzero()[:, 0]
    assert centre.tolist() == [y * 9 + x for y in (2, 3, 4) for x in (2, 3, 4, 5, 6)]


def test_an_even_window_holds_one_more_key_on_the_left() -> None:
    assert visible(Neighborhood((9,), 4))[4].nonzero()[:, 0].tolist() == [2, 3, 4, 5]


def test_dilation_is_attention_on_every_strided_slice() -> None:
    pattern, q = Neighborhood((11, 7), (3, 2), (2, 1), (3, 2)), torch.randn(3, 1, 2, 77, 4, dtype=torch.float64)
    out = foveal.attention(*q, pattern).view(1, 2, 11, 7, 4)
    grids = q.view(3, 1, 2, 11, 7, 4)
    for a in range(3):
        for b in range(2):
            part = grids[:, :, :, a::3, b::2]
            sub = Neighborhood(tuple(part.shape[3:5]), (3, 2), (2, 1))
            alone = foveal.attention(*part.flatten(3, 4), sub)
            assert_close(out[:, :, a::3, b::2].flatten(2, 3), alone, 1e-12)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_causal_along_time_only(stride: int) -> None:
    pattern = Neighborhood((6, 4, 4), 3, stride, 1, (True, False, False))
    q, k, v = torch.randn(3, 1, 2, 96, 8, dtype=torch.float64)
    changed = [torch.cat([t[:, :, :48], torch.randn(1, 2, 48, 8, dtype=torch.float64)], 2) for t in (q, k, v)]
    out, other = (foveal.attention(*x, pattern) for x in ((q, k, v), changed))
    assert torch.equal(out[:, :, :48], other[:, :, :48]), "frames up to t do not see later frames"
    assert (visible(pattern).sum(-1) >= 1).all()


def test_neighborhoods_are_not_symmetric() -> None:
    seen = visible(Neighborhood((12,), 4))
    assert not torch.equal(seen, seen.T)


def test_shifting_the_input_shifts_the_output_away_from_borders() -> None:
    q, k, v = torch.randn(3, 1, 1, 48, 4, dtype=torch.float64)
    for stride, shift in ((1, 1), (4, 4)):
        pattern = Neighborhood((48,), 8, stride)
        moved = foveal.attention(*(t.roll(shift, 2) for t in (q, k, v)), pattern)
        out = foveal.attention(q, k, v, pattern)
        assert_close(moved[:, :, 16 + shift : 32], out[:, :, 16 : 32 - shift], 1e-12)
    strided = Neighborhood((48,), 8, 4)
    moved = foveal.attention(*(t.roll(1, 2) for t in (q, k, v)), strided)
    assert not torch.allclose(moved[:, :, 17:32], foveal.attention(q, k, v, strided)[:, :, 16:31])


def test_presets() -> None:
    assert Neighborhood.swin((8, 8), 4) == Neighborhood((8, 8), 4, 4)
    assert Neighborhood.halo((16, 16), 4, 2) == Neighborhood((16, 16), (8, 8), (4, 4))
    assert Neighborhood.sta((16, 32), (4, 8), (12, 16)) == Neighborhood((16, 32), (12, 16), (4, 8))
    inner = visible(Neighborhood.halo((16,), 4, 2))
    assert inner[5].nonzero()[:, 0].tolist() == list(range(2, 10)), "the block 4…7 and two tokens on either side"
    assert inner[0].nonzero()[:, 0].tolist() == list(range(8)), "at the border the window slides inwards"
    with pytest.raises(ConfigError, match=r"window is \(10, 16\); expected multiples of the tile \(4, 8\)"):
        Neighborhood.sta((16, 32), (4, 8), (10, 16))


def test_sta_is_sliding_tiles_of_one_size() -> None:
    pattern = Neighborhood.sta((8, 12), 4, (8, 4)).tiled((4, 4))
    kinds = block_mask_kinds(layout_of(dataclasses.replace(pattern, layout="blocks"), 96, 96))[0, 0]
    assert set(kinds.unique().tolist()) == {0, FULL}, "fully block-sparse"
    assert (kinds > 0).sum(-1).tolist() == [2] * 6


def test_an_incomplete_last_block_reads_earlier_tokens_again() -> None:
    seen = visible(Neighborhood.blocked((10,), 4))
    assert seen[9].nonzero()[:, 0].tolist() == [6, 7, 8, 9]
    assert seen[8].equal(seen[9])


# --- layouts and caches --------------------------------------------------------------------------------------------


def test_shared_windows_become_exact_lists() -> None:
    rows = layout_of(Neighborhood((64, 64), 16, 8), 4096, 4096)
    assert isinstance(rows, Groups) and rows.cu_q.diff().tolist() == [64] * 128
    tiles = layout_of(Neighborhood((64, 64), 16, 8, q_tile=(8, 8)), 4096, 4096)
    assert isinstance(tiles, KeySelection) and tiles.index.shape == (1, 1, 64, 256) and tiles.block_size == 64
    line = layout_of(Neighborhood((300,), 40, 20, layout="lists"), 300, 300)
    assert isinstance(line, KeySelection) and line.index.shape == (1, 1, 15, 40)
    exact = measure(rows, BaseMask.build(4096, 4096, causal=False), 2, 1, 1)
    assert exact.density == 256 / 4096 and exact.tile_density == exact.density


@pytest.mark.parametrize("dilation", [(1, 2), (2, 1), (2, 3)])
def test_lists_of_dilated_grids_follow_the_order_of_tiles(dilation: tuple[int, int]) -> None:
    pattern = Neighborhood((13, 14), 4, 4, dilation, q_tile=(4, 2), kv_tile=(3, 2), layout="lists")
    orders = pattern.tilings()
    at = [order.permute(torch.arange(1, 183)[:, None])[:, 0] - 1 for order in orders]
    seen = mask(pattern.axes())[at[0].clamp(min=0)][:, at[1].clamp(min=0)]
    seen = seen & (at[0] >= 0)[:, None] & (at[1] >= 0)
    assert torch.equal(pairs(layout_of(pattern, *seen.shape), *seen.shape), seen)


def test_aligned_tiles_are_whole_and_ask_no_mask() -> None:
    layout = layout_of(Neighborhood((64, 64), 16, 8, q_tile=(8, 8), kv_tile=(4, 4)), 4096, 4096)
    assert isinstance(layout, BlockMask)
    assert set(block_mask_kinds(layout).unique().tolist()) == {0, FULL}
    assert measure(layout, BaseMask.build(4096, 4096, causal=False), 1, 1).density == 256 / 4096


def test_layouts_are_made_once() -> None:
    pattern = Neighborhood((20, 20), 6)
    first = layout_of(pattern, 400, 400)
    assert layout_of(pattern, 400, 400) is first
    assert layout_of(dataclasses.replace(pattern, window=5), 400, 400) is not first
    assert pattern.static


def test_tile_kinds_of_a_long_video_need_no_pairs() -> None:
    pattern = Neighborhood((30, 48, 80), (18, 24, 24), (16, 8, 8), q_tile=(2, 8, 8), kv_tile=(2, 8, 8))
    n = pattern.tilings()[0].length
    layout = layout_of(dataclasses.replace(pattern, layout="blocks"), n, n)
    kinds = block_mask_kinds(layout)[0, 0]
    assert kinds.shape == (900, 900)
    assert (kinds > 0).sum(-1).max() == 81 and set(kinds.unique().tolist()) == {0, FULL}


def test_one_new_frame_of_a_growing_video() -> None:
    pattern = Neighborhood((-1, 3, 4), (2, 3, 3), causal=(True, False, False))
    q, k, v = torch.randn(3, 1, 2, 60, 4, dtype=torch.float64)
    whole = foveal.attention(q, k, v, pattern, causal=True)
    parts = []
    for t in range(5):
        rows = slice(12 * t, 12 * t + 12)
        parts.append(foveal.attention(q[:, :, rows], k[:, :, : rows.stop], v[:, :, : rows.stop], pattern, causal=True))
    assert_close(torch.cat(parts, 2), whole, 1e-12)
    token = foveal.attention(q[:, :, 50:51], k[:, :, :51], v[:, :, :51], pattern, causal=True)
    assert_close(token, whole[:, :, 50:51], 1e-12)


def test_the_grid_may_come_from_the_context() -> None:
    pattern = Neighborhood(None, 3)
    q = torch.zeros(1, 1, 20, 4)
    context = SelectContext(BaseMask.build(20, 20, causal=False), grid=(4, 5))
    assert torch.equal(pairs(pattern.select(q, q, context)[0], 20, 20), mask(Neighborhood((4, 5), 3).axes()))


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": (8, 8), "window": 9}, r"axis 0 of grid \(8, 8\): window is 9; expected 1 to 8"),
        ({"grid": (8, 8), "window": (4, 5), "dilation": (1, 2)}, "axis 1 .* window is 5; expected 1 to 4"),
        ({"grid": (8, 8), "window": 4, "stride": (1, 5)}, r"stride is \(1, 5\); expected at most the window, 4"),
        ({"grid": (8, 8), "window": (4, 4, 4)}, r"window is \(4, 4, 4\); expected one value, or 2"),
        ({"grid": (), "window": 4}, r"grid is \(\); expected"),
        ({"grid": (8, -1), "window": 4}, r"grid is \(8, -1\); expected"),
        ({"grid": (2, 2, 2, 2), "window": 2}, "grid has 4 axes; expected one, two or three"),
        ({"grid": (-1, 2, 2, 2), "window": 2}, "grid has 4 axes; expected one, two or three"),
        ({"grid": (8, 8), "window": ()}, r"window is \(\); expected"),
        ({"grid": (8, 8), "window": 4, "q_tile": (4,)}, r"q_tile is \(4,\); expected 2 numbers"),
        ({"grid": (8, 8), "window": 4, "kv_tile": (4, 4)}, r"kv_tile is \(4, 4\) without q_tile"),
        ({"grid": (8, 8), "window": 4, "extra": -1}, "extra is -1"),
    ],
)
def test_fields_that_do_not_fit_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Neighborhood(**fields)


@pytest.mark.parametrize(
    ("make", "sizes", "message"),
    [
        (Neighborhood.sta, (0, 4), "sta: tile is 0; expected whole numbers of at least 1"),
        (Neighborhood.sta, ((4, 0), 4), r"sta: tile is \(4, 0\); expected"),
        (Neighborhood.sta, (4, "4"), "sta: window is '4'; expected"),
        (Neighborhood.sta, ((4,), 4), r"sta: tile is \(4,\); expected one value, or 2"),
        (Neighborhood.halo, (4, -1), "halo: halo is -1; expected whole numbers of at least 0"),
        (Neighborhood.halo, (0, 1), "halo: block is 0; expected whole numbers of at least 1"),
    ],
)
def test_sizes_of_presets_are_named(make: Any, sizes: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make((8, 8), *sizes)


@pytest.mark.parametrize(
    ("pattern", "lengths", "causal", "error", "message"),
    [
        (Neighborhood((8, 8), 4), (63, 63), False, ShapeError, r"grid is \(8, 8\), 64 tokens, and the sequence has 63"),
        (Neighborhood((8, 8), 4), (65, 65), True, ShapeError, "expected a length of 64"),
        (Neighborhood((8, 8), 4, extra=3), (64, 64), False, ShapeError, "extra = 3; expected a length of 67"),
        (Neighborhood((-1, 8), 4), (63, 63), False, ShapeError, "expected a multiple of 8"),
        (Neighborhood((-1, 8), 4, dilation=9), (64, 64), False, ConfigError, "dilation is 9"),
        (Neighborhood((8, 8), 4), (32, 64), False, UnsupportedError, "32 queries and 64 keys"),
        (Neighborhood((6, 6), 4, q_tile=(4, 4)), (36, 36), False, ShapeError, "36 queries; expected 64"),
        (Neighborhood((6, 6), 4, q_tile=(4, 4), kv_tile=(3, 3)), (64, 64), False, ShapeError, "64 keys; expected 36"),
        (Neighborhood((8, 8), 4, q_tile=(4, 4)), (64, 64), True, UnsupportedError, "tile order .* bidirectional"),
        (Neighborhood((8, 8), 4, causal=True, layout="lists"), (64, 64), False, UnsupportedError, "layout='lists'"),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    pattern: Neighborhood, lengths: tuple[int, int], causal: bool, error: type[FovealError], message: str
) -> None:
    with pytest.raises(error, match=message):
        layout_of(pattern, *lengths, causal=causal)
