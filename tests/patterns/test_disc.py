"""CLEAR: the identities of its sheet's section 6, the table of operations, pooled tokens, and strips over devices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveal
from foveal.core.base_mask import EMPTY, FULL, BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.core.layouts import BlockMask
from foveal.patterns import Disc, Operator, PooledDisc, attend
from foveal.patterns.disc import disc_pairs, proportional_scale
from foveal.patterns.near import Places, near_layout, tile_kinds
from foveal.patterns.strips import exchanged, patch_parallel, strips

from ..support import assert_close


def tensors(length: int, heads: int = 4, kv_heads: int = 2, dim: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(2, h, length, dim, generator=make, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)
    )


def context(length: int, **extra: object) -> SelectContext:
    return SelectContext(base=BaseMask.build(length, length, causal=False), **extra)  # type: ignore[arg-type]


def definition(grid: tuple[int, int], text: int, radius: int) -> Tensor:
    """``(N, N)`` bool from the sheet, in row-major order."""
    place = torch.arange(grid[0] * grid[1])
    y, x = place // grid[1], place % grid[1]
    seen = torch.ones(text + len(place), text + len(place), dtype=torch.bool)
    seen[text:, text:] = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 < radius**2
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def run(pattern: Disc | PooledDisc, q: Tensor, k: Tensor, v: Tensor, state: object = None) -> Tensor:
    return attend(pattern, q, k, v, context(q.shape[2]), state)[0]


# --- the mask ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_tiles_are_the_definition_on_random_grids(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    text, radius = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 12))
    tile = data.draw(st.sampled_from([None, (1, 1)])) if height * width % 4 or height % 2 else (2, 1)
    pattern, n = Disc(radius, (height, width), text, tile), text + height * width
    seen = definition((height, width), text, radius)
    order = pattern.order()
    q, k, v = tensors(n, seed=radius)
    got = run(pattern, q[:, :, order], k[:, :, order], v[:, :, order])
    assert_close(got[:, :, order.argsort()], dense(q, k, v, seen))
    assert pattern.pairs() == int(seen.sum())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_tile_kinds_are_exact_wherever_tokens_lie(data: st.DataObject) -> None:
    block, limit = data.draw(st.sampled_from([1, 3, 8, 16])), data.draw(st.integers(1, 60))
    make = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 20)))

    def somewhere(n: int) -> Places:
        x = torch.randint(-1, 3, (n,), generator=make).cumsum(0) if data.draw(st.booleans()) else torch.arange(n) % 5
        y = torch.randint(0, 3, (n,), generator=make).cumsum(0) // 4
        return Places(y.int(), x.int(), torch.rand(n, generator=make) < data.draw(st.sampled_from([0.0, 0.1, 1.0])))

    q, k = somewhere(data.draw(st.integers(1, 40))), somewhere(data.draw(st.integers(1, 40)))
    apart = (q.y[:, None] - k.y) ** 2 + (q.x[:, None] - k.x) ** 2
    seen = q.text[:, None] | k.text | (apart < limit)
    kinds = tile_kinds(q, k, limit, block)
    for u, row in enumerate(seen.split(block)):
        for c, tile in enumerate(row.split(block, 1)):
            assert int(kinds[u, c]) == (FULL if tile.all() else 1 if tile.any() else EMPTY)


def test_a_radius_beyond_the_diagonal_is_dense_and_radius_one_is_oneself_and_the_text() -> None:
    q, k, v = tensors(4 + 30)
    assert_close(run(Disc(9, (5, 6), 4), q, k, v), dense(q, k, v))
    assert Disc(9, (5, 6), 4).select(q, k, context(34))[0] is None
    seen = torch.eye(34, dtype=torch.bool)
    seen[:4], seen[:, :4] = True, True
    assert_close(run(Disc(1, (5, 6), 4), q, k, v), dense(q, k, v, seen))


@pytest.mark.parametrize(("radius", "size"), [(8, 193), (16, 793), (32, 3205)])
def test_the_mask_is_symmetric_and_an_interior_disc_has_its_published_size(radius: int, size: int) -> None:
    side = 2 * radius + 1
    middle = side // 2 * side + side // 2
    assert int(definition((side, side), 0, radius)[middle].sum()) == size  # strictly below r²; 197 for r = 8 with ≤
    places = Disc(radius, (side, side)).places((side, side), side * side)
    kinds = tile_kinds(places, places, radius**2, 64)
    assert torch.equal(kinds, kinds.T)


def test_text_queries_equal_full_attention() -> None:
    q, k, v = tensors(7 + 90)
    assert_close(run(Disc(3, (9, 10), 7), q, k, v)[:, :, :7], dense(q, k, v)[:, :, :7])


def test_locality() -> None:
    pattern, grid, text = Disc(4, (16, 16), 5), (16, 16), 5
    q, k, v = tensors(text + 256)
    out = run(pattern, q, k, v)
    seen = definition(grid, text, 4)
    for changed in (text, text + 100, text + 255):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, changed], v2[:, :, changed] = 2.0, -3.0
        same = (run(pattern, q, k2, v2) == out).all(-1).all(1).all(0)
        assert torch.equal(same, ~seen[:, changed])  # bit for bit outside, different inside


def test_the_interior_moves_with_the_image_and_a_square_image_may_turn() -> None:
    pattern = Disc(3, (12, 12))
    q, k, v = tensors(144)

    def apply(change: object) -> Tensor:
        moved = [change(t.unflatten(2, (12, 12))).flatten(2, 3) for t in (q, k, v)]  # type: ignore[operator]
        return run(pattern, *moved).unflatten(2, (12, 12))

    out = apply(lambda t: t)
    assert_close(apply(lambda t: t.rot90(1, (2, 3))), out.rot90(1, (2, 3)), what="quarter turn")
    moved = apply(lambda t: t.roll((2, 1), (2, 3)))
    inner = slice(5, 9)
    assert_close(moved[:, :, inner, inner], out.roll((2, 1), (2, 3))[:, :, inner, inner], what="shift")


def test_large_images_need_no_pairs() -> None:
    pattern = Disc(8, (256, 256), 512, (8, 16))
    base = BaseMask.build(512 + 65536, 512 + 65536, causal=False)
    empty = torch.empty(1, 1, 0, 8)
    layout, _ = pattern.select(empty, empty, SelectContext(base=base))
    assert isinstance(layout, BlockMask)
    assert pattern.select(empty, empty, SelectContext(base=base))[0] is layout
    kinds = tile_kinds(*(2 * [pattern.places((256, 256), base.kv_len)]), 64, 128)  # type: ignore[arg-type]
    assert kinds.shape == (516, 516)
    assert int((kinds[300] > EMPTY).sum()) <= 4 + 15  # text, and at most 5 × 3 tiles around one of 8 × 16


def test_gradients_equal_dense_attention_under_the_mask() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(3 + 120))
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    got = torch.autograd.grad((run(Disc(3, (10, 12), 3), q, k, v) * weight).sum(), (q, k, v))
    seen = definition((10, 12), 3, 3)
    for a, b in zip(got, torch.autograd.grad((dense(q, k, v, seen) * weight).sum(), (q, k, v)), strict=True):
        assert_close(a, b)


# --- operations ----------------------------------------------------------------------------------------------------

TABLE = {
    64: {None: "260.9", 8: "63.5", 16: "86.6", 32: "154.1"},
    128: {None: "3507.9", 8: "246.2", 16: "352.6", 32: "724.3"},
    256: {None: "53604.4", 8: "979.3", 16: "1433.2", 32: "3141.7"},
    512: {None: "847.7", 8: "3.915", 16: "5.789", 32: "13.085"},
}
"""GFLOPs per layer of the paper (TFLOPs in the last row), by side in tokens and radius; None is dense."""


@pytest.mark.parametrize("side", TABLE)
def test_operations_equal_the_papers_table_to_the_printed_digit(side: int) -> None:
    for radius, printed in TABLE[side].items():
        pairs = (side * side + 512) ** 2 if radius is None else disc_pairs((side, side), 512, radius)
        value = 4 * 3072 * pairs / (1e12 if side == 512 else 1e9)
        assert abs(value - float(printed)) <= 0.51 * 10 ** -len(printed.split(".")[1]), (radius, value)
    dense, small = (512 * 512 + 512) ** 2, disc_pairs((512, 512), 512, 8)
    assert round(100 * (1 - small / dense), 2) == 99.54


def test_pairs_equal_what_the_layout_keeps() -> None:
    for tile in (None, (8, 8)):
        pattern = Disc(8, (64, 64), 128, tile)
        base = BaseMask.build(4224, 4224, causal=False)
        empty = torch.empty(1, 1, 0, 8)
        kept = measure(pattern.select(empty, empty, SelectContext(base=base))[0], base, 1, 1)
        assert kept.pairs == pattern.pairs()
        assert kept.tile_density < (0.35 if tile is None else 0.2)


def test_proportional_scale_is_the_usual_one_at_the_trained_length() -> None:
    assert proportional_scale(128, 4608) == pytest.approx(128**-0.5)
    assert proportional_scale(128, 4 * 4096 + 512) > 128**-0.5


# --- pooled tokens -------------------------------------------------------------------------------------------------


def pooled_reference(
    q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], text: int, radius: int, weight: Tensor
) -> Tensor:
    f, (height, width) = weight.shape[0], grid

    def pooled(t: Tensor) -> Tensor:
        cells = t[:, :, text:].unflatten(2, (height // f, f, width // f, f))
        return torch.einsum("bhyixjd,ij->bhyxd", cells, weight).flatten(2, 3)

    far = torch.ones(q.shape[2], height * width // f**2, dtype=torch.bool)
    far[:text] = False
    seen = torch.cat([definition(grid, text, radius), far], 1)
    return dense(q, torch.cat([k, pooled(k)], 2), torch.cat([v, pooled(v)], 2), seen)


@pytest.mark.parametrize("tile", [None, (4, 2)])
@pytest.mark.parametrize("learned", [False, True])
def test_pooled_tokens_join_the_softmax(tile: tuple[int, int] | None, learned: bool) -> None:
    disc = Disc(3, (8, 12), 5, tile)
    q, k, v = tensors(5 + 96)
    weight = torch.rand(4, 4, dtype=q.dtype, generator=torch.Generator().manual_seed(3)) if learned else None
    order = disc.order()
    out, lse, state = attend(PooledDisc(disc), *(t[:, :, order] for t in (q, k, v)), context(101), weight)
    assert state is weight
    expected = pooled_reference(
        q, k, v, (8, 12), 5, 3, torch.full((4, 4), 1 / 16, dtype=q.dtype) if weight is None else weight
    )
    assert_close(out[:, :, order.argsort()], expected)
    assert_close(
        out[:, :, :5], run(disc, *(t[:, :, order] for t in (q, k, v)))[:, :, :5], what="text rows see no pooled token"
    )
    assert lse.shape == q.shape[:3]


def test_a_constant_image_pools_to_itself_and_zero_weights_only_dilute() -> None:
    disc = Disc(3, (8, 8), 2)
    q, k, v = tensors(66)
    v[:, :, 2:] = 1.5
    from foveal.patterns.disc_pooled import pool

    cells = PooledDisc(disc)._cells((8, 8))
    assert_close(
        pool(v[:, :, 2:], torch.full((4, 4), 1 / 16, dtype=v.dtype), cells),
        torch.full((2, 2, 4, 8), 1.5, dtype=v.dtype),
    )
    plain, lse, _ = attend(disc, q, k, v, context(66))
    zero = attend(PooledDisc(disc), q, k, v, context(66), torch.zeros(4, 4, dtype=q.dtype))[0]
    share = torch.exp(lse) / (torch.exp(lse) + 4)  # four pooled keys with logit 0 and value 0
    share[:, :, :2] = 1.0
    assert_close(zero, plain * share[..., None])


def test_gradients_reach_the_pooling_weight() -> None:
    weight = torch.full((4, 4), 1 / 16, dtype=torch.float64).requires_grad_()
    q, k, v = (t.requires_grad_() for t in tensors(5 + 96))
    leaves = (q, k, v, weight)
    got = torch.autograd.grad(
        attend(PooledDisc(Disc(3, (8, 12), 5)), q, k, v, context(101), weight)[0].square().sum(), leaves
    )
    expected = torch.autograd.grad(pooled_reference(q, k, v, (8, 12), 5, 3, weight).square().sum(), leaves)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


def test_an_operator_is_json_too() -> None:
    pattern = PooledDisc(Disc(8, (64, 64), 512, (8, 8)), factor=2)
    data = pattern.to_json()
    assert data["operator"] == "pooled_disc" and data["disc"]["pattern"] == "disc"
    assert Operator.from_json(data) == pattern
    with pytest.raises(ConfigError, match="Did you mean 'pooled_disc'"):
        Operator.from_json({"operator": "pooled_disk"})
    with pytest.raises(ConfigError, match="operator is"):
        Operator.from_json({"pattern": "disc"})


# --- strips --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("radius", [1, 2, 4])
def test_strips_with_exact_merge_equal_one_device(count: int, radius: int) -> None:
    disc = Disc(radius, (24, 10), 6)
    q, k, v = tensors(246)
    one = run(disc, q, k, v)
    assert_close(patch_parallel(disc, (24, 10), q, k, v, count), one, 1e-12)
    mean = patch_parallel(disc, (24, 10), q, k, v, count, text="mean")
    assert_close(mean[:, :, 6:], one[:, :, 6:], 1e-12, "image rows")
    if count == 1:
        assert_close(mean, one, 1e-12, "the average of one device")
    else:
        assert (mean - one)[:, :, :6].abs().max() > 1e-3


def test_strips_exchange_borders_with_neighbours_only() -> None:
    disc = Disc(4, None, 6)
    assert [(s.first, s.stop, s.above, s.below) for s in strips(disc, (24, 10), 4)] == [
        (0, 6, 0, 3), (6, 12, 3, 3), (12, 18, 3, 3), (18, 24, 3, 0),
    ]  # fmt: skip
    assert exchanged(disc, (24, 10), 4) == (2 * 3 * 3 * 10, 240 * 3)
    q, k, v = tensors(246)
    out = patch_parallel(Disc(4, (24, 10), 6), (24, 10), q, k, v, 4)
    k2 = k.clone()
    k2[:, :, 6 + 15 * 10 :] = 9.0  # row 15 is the first that strip [6, 12) does not receive
    again = patch_parallel(Disc(4, (24, 10), 6), (24, 10), q, k2, v, 4)
    assert torch.equal(again[:, :, 6 : 6 + 120], out[:, :, 6 : 6 + 120])
    assert not torch.equal(again[:, :, 6 + 120 :], out[:, :, 6 + 120 :])


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda q, k, v: run(Disc(3, (8, 13), 5), q, k, v), ShapeError, "grid is (8, 13).*expected a length of 109"),
        (lambda q, k, v: run(Disc(3), q, k, v), ConfigError, "grid is None"),
        (lambda q, k, v: Disc(3, (8, 12), 5, (3, 4)), ConfigError, "tile is (3, 4) on the grid (8, 12)"),
        (lambda q, k, v: Disc(3, (-1, 12), 5, (1, 4)), ConfigError, "tile is"),
        (lambda q, k, v: foveal.attention(q[:, :, :9], k, v, Disc(3, (8, 12), 5)), UnsupportedError, "9 queries and 101 keys"),
        (lambda q, k, v: run(PooledDisc(Disc(3, (8, 12), 5), 3), q, k, v), ShapeError, "factor is 3.*(8, 12)"),
        (lambda q, k, v: run(PooledDisc(Disc(3, (8, 12), 5)), q, k, v, torch.ones(2, 2)), ShapeError, "state is (2, 2).*(4, 4)"),
        (lambda q, k, v: strips(Disc(3), (8, 12), 3), ConfigError, "count is 3.*divides the height, 8"),
        (lambda q, k, v: strips(Disc(4), (8, 12), 4), ConfigError, "strips of 2 rows; expected at least 3"),
        (lambda q, k, v: strips(Disc(2, (8, 12), 0, (2, 2)), (8, 12), 2), ConfigError, "tile is (2, 2)"),
        (lambda q, k, v: patch_parallel(Disc(2, None, 5), (8, 12), q, k, v, 2, "sum"), ConfigError, "text is 'sum'"),
        (lambda q, k, v: patch_parallel(Disc(2, (6, 16), 5), (8, 12), q, k, v, 2), ConfigError, "grid is (8, 12) and the pattern's (6, 16)"),
        (lambda q, k, v: patch_parallel(Disc(2, None, 5), (-8, -12), q, k, v, 2), ConfigError, "grid is (-8, -12)"),
        (lambda q, k, v: patch_parallel(Disc(2, None, 5), (8, 11), q, k, v, 2), ShapeError, "101 tokens; expected 93|101 and 101"),
    ],
)  # fmt: skip
def test_bad_input_names_argument_value_and_what_is_allowed(act: object, error: type[Exception], words: str) -> None:
    pattern = words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(error, match=pattern):
        act(*tensors(101))  # type: ignore[operator]


def test_the_grid_may_come_from_the_context_and_layouts_take_places_of_their_own() -> None:
    q, k, v = tensors(101)
    out = attend(Disc(3, text=5), q, k, v, context(101, grid=(8, 12)))[0]
    assert_close(out, run(Disc(3, (8, 12), 5), q, k, v))
    flat = Places(torch.zeros(6).int(), torch.arange(6).int(), torch.zeros(6, dtype=torch.bool))
    assert near_layout(flat[1:3], flat, 4).seq_lengths == (2, 6)
    assert math.prod(Disc(3, tile=(4, 8)).order((8, 8)).shape) == 64
