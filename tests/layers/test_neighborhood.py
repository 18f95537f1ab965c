"""Neighborhood attention as function and modules; the primitives of FNA; three forms of one operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, FovealError, ShapeError
from foveal.core.grid import Axis
from foveal.kernels.unfused import inn, neighbors, nn, pn, unfused
from foveal.layers.neighborhood import (
    NeighborhoodAttention1d,
    NeighborhoodAttention2d,
    NeighborhoodAttention3d,
    neighborhood_attention,
)

from ..neighbors import axes, dense, mask
from ..support import allocated_peak, assert_close

WAYS: list[dict[str, Any]] = [
    {},
    {"form": "naive"},
    {"form": "gemm"},
    {"form": "gemm", "tile": 3},
    {"order": "rows"},
    {"order": "tiles"},
    {"order": "tiles", "tile": 2, "kv": 3},
]


def words(one: tuple[Axis, ...]) -> list[Any]:
    return [[getattr(axis, name) for axis in one] for name in ("window", "stride", "dilation", "causal")]


def grid(one: tuple[Axis, ...]) -> list[int]:
    return [axis.length for axis in one]


def flat(x: Tensor) -> Tensor:
    """``(B, *grid, H, D)`` as ``(B, H, N, D)``."""
    return x.flatten(1, -3).transpose(1, 2)


@given(
    axes(),
    st.sampled_from(WAYS),
    st.sampled_from([0, 3]),
    st.sampled_from([(2, 1), (2, 2), (4, 2)]),
    st.integers(0, 2**31),
)
def test_all_forms_equal_masked_dense_attention(
    one: tuple[Axis, ...], way: dict[str, Any], extra: int, heads: tuple[int, int], seed: int
) -> None:
    way, make = dict(way), torch.Generator().manual_seed(seed)
    if "tile" in way:
        way["q_tile"] = [way.pop("tile")] * len(one)
    if "kv" in way:
        way["kv_tile"] = [way.pop("kv")] * len(one)
    shapes = [(2, *grid(one), h, d) for h, d in ((heads[0], 4), (heads[1], 4), (heads[1], 3))]
    shapes += [(2, extra, heads[1], 4), (2, extra, heads[1], 3)] if extra else []
    leaves = [torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_() for shape in shapes]
    beside = dict(zip(("k_extra", "v_extra"), leaves[3:], strict=False))
    seen, (q, k, v) = mask(one), map(flat, leaves[:3])
    if extra:
        k, v = (torch.cat([x, e.transpose(1, 2)], 2) for x, e in zip((k, v), leaves[3:], strict=True))
        seen = torch.cat([seen, torch.ones(seen.shape[0], extra, dtype=torch.bool)], 1)
    expected, lse = dense(q, k, v, seen)
    got, got_lse = neighborhood_attention(*leaves[:3], *words(one), return_lse=True, **beside, **way)
    assert_close(flat(got), expected, what="one softmax over window and extra keys")
    assert_close(got_lse.flatten(1, -2).transpose(1, 2), lse, what="natural logarithm of scaled logits")
    weight = torch.randn(expected.shape, generator=make, dtype=torch.float64)
    want = torch.autograd.grad((expected * weight).sum() + lse.sum(), leaves)
    have = torch.autograd.grad((flat(got) * weight).sum() + got_lse.sum(), leaves)
    for a, b in zip(have, want, strict=True):
        assert_close(a, b, 1e-9)


@given(axes(), st.sampled_from(["naive", "gemm"]), st.integers(0, 2**31))
def test_the_primitives_are_adjoint(one: tuple[Axis, ...], form: Any, seed: int) -> None:
    near, make = neighbors(one), torch.Generator().manual_seed(seed)
    p, v, y = (torch.randn(2, 2, near.tokens, n, generator=make, dtype=torch.float64) for n in (near.width, 3, 3))
    p = p if near.hidden is None else p.masked_fill(near.hidden, 0)
    assert_close((nn(p, v, near, form) * y).sum(), (v * inn(p, y, near, form)).sum(), 1e-11, "IN is the adjoint of NN")
    assert_close(
        (pn(y, v, near, form) * p).sum(), (nn(p, v, near, form) * y).sum(), 1e-11, "PN and NN are adjoint in P"
    )


@pytest.mark.parametrize("form", ["naive", "gemm"])
def test_gradcheck_of_the_unfused_forms(form: Any) -> None:
    one = (Axis(5, 3, 2, 1, True), Axis(6, 2, 1, 2))
    leaves = [torch.randn(1, 2, 30, d, dtype=torch.float64, requires_grad=True) for d in (3, 3, 2)]
    assert torch.autograd.gradcheck(lambda *x: unfused(*x, one, scale=0.7, form=form), leaves)


@pytest.mark.parametrize("form", ["naive", "gemm"])
def test_weights_are_a_softmax_and_hidden_slots_are_zero(form: Any) -> None:
    one = (Axis(7, 4, 2, 1, True),)
    q, k, v = torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    q.requires_grad_()
    out, lse, weights = unfused(q, k, v, one, scale=0.5, form=form)
    assert_close(weights.sum(-1), torch.ones(1, 2, 7, dtype=torch.float64), 1e-12)
    index = neighbors(one).index
    assert (weights[..., index < 0] == 0).all()
    logits = pn(q, k, neighbors(one)) * 0.5
    assert_close(lse.exp(), torch.where(index >= 0, logits.exp(), 0.0).sum(-1), 1e-12)
    (gradient,) = torch.autograd.grad(out.sum() + weights.square().sum(), q)
    assert gradient.isfinite().all()


def test_relative_position_bias_is_added_by_offset() -> None:
    one = (Axis(6, 3), Axis(5, 3, 1, 1))
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    q, k, v = torch.randn(3, 1, 2, 30, 4, dtype=torch.float64)
    y, x = torch.arange(30) // 5, torch.arange(30) % 5
    apart = [(c[None] - c[:, None] + 2).clamp(0, 4) for c in (y, x)]
    logits = (q @ k.transpose(-1, -2) * 0.5 + bias[:, apart[0], apart[1]]).masked_fill(~mask(one), -torch.inf)
    expected = logits.softmax(-1) @ v
    for form in ("naive", "gemm"):
        out, _, _ = unfused(q, k, v, one, scale=0.5, form=form, bias=bias)  # type: ignore[arg-type]
        assert_close(out, expected)
        assert_close(torch.autograd.grad(out.square().sum(), bias)[0], torch.autograd.grad(expected.square().sum(), bias, retain_graph=True)[0])  # fmt: skip


@pytest.mark.parametrize("way", [{"form": "naive"}, {"form": "gemm"}, {}], ids=str)
def test_a_window_of_one_returns_the_values_and_a_whole_one_is_full_attention(way: dict[str, Any]) -> None:
    q, k, v = torch.randn(3, 2, 4, 5, 2, 3, dtype=torch.float64)
    assert_close(neighborhood_attention(q, k, v, 1, **way), v, 1e-12)
    full = dense(flat(q), flat(k), flat(v), torch.ones(20, 20, dtype=torch.bool))[0]
    assert_close(flat(neighborhood_attention(q, k, v, (4, 5), **way)), full)


@pytest.mark.parametrize("shape", [(19, 29), (33, 33), (67, 80)])
def test_results_do_not_depend_on_tiles(shape: tuple[int, int]) -> None:
    dilation = (5, 11) if shape == (67, 80) else 1
    q, k, v = torch.randn(3, 1, *shape, 1, 8)
    outs = [neighborhood_attention(q, k, v, (7, 6), (1, 2), dilation, order="tiles", q_tile=t) for t in ((4, 16), (8, 8), (16, 4))]  # fmt: skip
    outs += [neighborhood_attention(q, k, v, (7, 6), (1, 2), dilation, form="gemm", q_tile=(4, 16))]
    for out in outs[1:]:
        assert_close(out, outs[0], 1e-6)


def test_an_explicit_scale_of_zero_is_honoured() -> None:
    q, k, v = torch.randn(3, 1, 6, 1, 4, dtype=torch.float64)
    for form in ("fused", "gemm", "naive"):
        out = neighborhood_attention(q, k, v, 3, 3, scale=0.0, form=form)  # type: ignore[arg-type]
        assert_close(out[0, 0], v[0, :3].mean(0), 1e-12)


@pytest.mark.parametrize("order", ["rows", "tiles"])
def test_two_backward_passes_are_bit_equal(order: Any) -> None:
    leaves = [torch.randn(1, 12, 12, 2, 8, requires_grad=True) for _ in range(3)]
    runs = [
        torch.autograd.grad(neighborhood_attention(*leaves, 5, 4, order=order).square().sum(), leaves) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 16, 16, 2, 16, dtype=dtype) for _ in range(3))
    exact = neighborhood_attention(q.double(), k.double(), v.double(), 7, 4)
    for way in ({}, {"order": "tiles"}, {"form": "gemm"}, {"form": "naive"}):
        out = neighborhood_attention(q, k, v, 7, 4, **way)  # type: ignore[arg-type]
        assert out.dtype == dtype
        assert_close(out.double(), exact, 1e-5 if dtype == torch.float32 else 3e-2)


MODULES = {1: NeighborhoodAttention1d, 2: NeighborhoodAttention2d, 3: NeighborhoodAttention3d}


@pytest.mark.parametrize("rank", MODULES)
def test_modules_equal_their_definition_in_both_layouts(rank: int) -> None:
    torch.manual_seed(0)
    module = MODULES[rank](12, 3, kernel_size=3, stride=2, is_causal=(True,) + (False,) * (rank - 1)).double()
    x = torch.randn(2, *(4, 5, 6)[:rank], 12, dtype=torch.float64)
    q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).unbind(-3)
    one = tuple(Axis(n, 3, 2, 1, a == 0) for a, n in enumerate(x.shape[1:-1]))
    out, _ = dense(flat(q), flat(k), flat(v), mask(one))
    expected = module.proj(out.transpose(1, 2).flatten(-2)).view(x.shape)
    assert_close(module(x), expected)
    module.channels_first = True
    assert_close(module(x.movedim(-1, 1)), expected.movedim(-1, 1))
    assert set(module.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}


def test_the_three_forms_swap_inside_a_module() -> None:
    module = NeighborhoodAttention2d(16, 2, 5)
    x = torch.randn(1, 9, 11, 16)
    outs = []
    for form in ("fused", "gemm", "naive"):
        module.form = form  # type: ignore[assignment]
        outs.append(module(x))
    assert_close(outs[1], outs[0], 1e-5)
    assert_close(outs[2], outs[0], 1e-5)


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda: NeighborhoodAttention2d(10, 3, 3), ConfigError, "num_heads is 3 for embed_dim 10"),
        (lambda: NeighborhoodAttention2d(4, 2, 3)(torch.zeros(1, 5, 4)), ShapeError, r"expected \(B, X, Y, C\) with C = 4"),
        (lambda: NeighborhoodAttention2d(4, 2, 3, channels_first=True)(torch.zeros(1, 5, 5, 4)), ShapeError, r"expected \(B, C, X, Y\)"),
        (lambda: NeighborhoodAttention2d(4, 2, 7)(torch.zeros(1, 5, 8, 4)), ConfigError, "axis 0 .*kernel_size is 7; expected 1 to 5"),
        (lambda: NeighborhoodAttention2d(4, 2, 0), ConfigError, "^kernel_size is 0; expected a whole number of at least 1, or 2, one per axis"),
        (lambda: NeighborhoodAttention1d(4, 2, 3.0), ConfigError, r"^kernel_size is 3.0; expected a whole number of at least 1\.$"),
        (lambda: NeighborhoodAttention2d(4, 2, (3, 3, 3)), ConfigError, r"^kernel_size is \(3, 3, 3\); expected .* or 2, one per axis"),
        (lambda: NeighborhoodAttention2d(4, 2, (3, 5), 4), ConfigError, r"^stride is 4; expected at most kernel_size, \(3, 5\)"),
        (lambda: NeighborhoodAttention3d(4, 2, 3, (1, 1)), ConfigError, r"^stride is \(1, 1\); expected .* or 3"),
        (lambda: NeighborhoodAttention3d(4, 2, 3, dilation=-1), ConfigError, "^dilation is -1"),
        (lambda: NeighborhoodAttention2d(4, 2, 3, is_causal=(True, 2)), ConfigError, r"^is_causal is \(True, 2\); expected True or False"),
        (lambda: NeighborhoodAttention2d(4, 2, 3, form="dense"), ConfigError, "^form is 'dense'; expected 'fused', 'gemm' or 'naive'"),
        (lambda: NeighborhoodAttention2d(4, 2, 3, order="foo"), ConfigError, "^order is 'foo'; expected 'auto', 'rows' or 'tiles'"),
        (lambda: NeighborhoodAttention2d(4, 2, 3, q_tile=(4,)), ConfigError, r"^q_tile is \(4,\); expected 2 whole numbers"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 4, 2, 2), 3, q_tile=(4,)), ConfigError, r"^q_tile is \(4,\); expected 2 whole numbers"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 4, 2, 2), 3, order="tiles", kv_tile=(4,)), ConfigError, r"^kv_tile is \(4,\); expected 2 whole numbers"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 4, 2, 2), 3, form="gemm", q_tile=(0, 4)), ConfigError, r"^q_tile is \(0, 4\); expected 2 whole numbers of at least 1"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 2, 2), 1, order="foo"), ConfigError, "^order is 'foo'"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 2, 2), 1, order="foo", form="naive"), ConfigError, "^order is 'foo'"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 2, 2), 2, 3), ConfigError, "^stride is 3; expected at most kernel_size, 2"),
        (lambda: neighborhood_attention(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 2), 1, form="gemm"), ShapeError, "q has head_dim 2 and k has 3"),
        (lambda: neighborhood_attention(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 3), torch.zeros(1, 4, 2, 2), 1, form="naive"), ShapeError, "q has head_dim 2 and k has 3"),
        (lambda: neighborhood_attention(torch.zeros(1, 4, 2, 2), *torch.zeros(2, 1, 4, 2, 2).double(), 1, form="gemm"), ShapeError, "expected the same dtype"),
        (lambda: neighborhood_attention(*torch.zeros(3, 2, 2), 1), ShapeError, "q has shape"),
        (lambda: neighborhood_attention(torch.zeros(1, 4, 2, 2), *torch.zeros(2, 1, 5, 2, 2), 1), ShapeError, "k has shape"),
        (lambda: neighborhood_attention(torch.zeros(1, 4, 3, 2), *torch.zeros(2, 1, 4, 2, 2), 1, form="gemm"), ShapeError, "multiple of num_kv_heads"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 2, 2), 1, form="dense"), ConfigError, "form is 'dense'"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 2, 2), 1, k_extra=torch.zeros(1, 1, 2, 2)), ShapeError, "only one of k_extra"),
        (lambda: neighborhood_attention(*torch.zeros(3, 1, 4, 2, 2), 1, k_extra=torch.zeros(1, 1, 1, 2), v_extra=torch.zeros(1, 1, 2, 2)), ShapeError, "k_extra has shape"),
    ],
)  # fmt: skip
def test_bad_input_is_named(run: Any, error: type[FovealError], message: str) -> None:
    with pytest.raises(error, match=message):
        run()


def test_the_form_that_stores_its_weights_doubles_with_four_times_the_window() -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 48, 48, 4, 64, generator=make) for _ in range(3))

    def peak(form: Any, window: int) -> int:
        with torch.no_grad():
            return allocated_peak(lambda: neighborhood_attention(q, k, v, window, form=form))

    assert peak("gemm", 16) > 2 * peak("gemm", 8) > 0
    assert peak("fused", 16) < peak("gemm", 8)
