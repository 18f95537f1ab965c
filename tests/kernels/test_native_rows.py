"""Softmax of rows in place: equal to torch's in float64, on every instruction set that the machine runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ShapeError
from foveal.kernels.native import unavailable

if unavailable() is not None:
    pytest.skip(f"native kernels: {unavailable()}", allow_module_level=True)

from foveal.kernels.native.rows import Products, pack_keys, softmax_rows_

from .isas import VARIANTS, on


def expected(x: Tensor, lo: Tensor, hi: Tensor, sink: Tensor | None, own: int) -> tuple[Tensor, ...]:
    """Weights, top, total, share, spread and distance by definition, in float64; rows that see nothing give 0, 1, 1, 0 and 0."""
    column = torch.arange(x.shape[-1])
    seen = (column >= lo[:, None]) & (column < hi[:, None])
    s = torch.where(seen, x.double(), -torch.inf)
    top = s.amax(-1)
    e = torch.where(seen, (s - top[..., None]).exp(), 0.0)
    total = e.sum(-1) + (0 if sink is None else (sink.double()[:, None] - top).exp())
    sees = (hi > lo).expand_as(top)
    w = torch.where(sees[..., None], e / total[..., None], 0.0)
    spread = torch.where(w > 0, w * (s - top[..., None]), 0.0).sum(-1)
    return (
        w,
        top,
        torch.where(sees, total, 1.0),
        torch.where(sees, e.sum(-1) / total, 1.0),
        torch.where(sees, spread, 0.0),
        (w * (column - own - torch.arange(x.shape[1])[:, None]).abs()).sum(-1),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    st.integers(1, 3), st.sampled_from([1, 2, 9, 32, 33, 70]), st.sampled_from([1, 7, 8, 31, 32, 33, 64, 100, 257]), st.booleans(), st.integers(0, 99),
    st.integers(-40, 300),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_rows(variant: str, heads: int, rows: int, width: int, with_sink: bool, seed: int, own: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(heads, rows, width, generator=g)
    lo = torch.randint(0, width, (rows,), generator=g)
    hi = torch.maximum(torch.randint(0, width + 1, (rows,), generator=g), lo)  # some rows see nothing
    sink = torch.randn(heads, generator=g) if with_sink else None
    weights, top, total, share, spread, away = expected(x, lo, hi, sink, own)
    got = x.clone()
    with on(variant):
        facts = softmax_rows_(got, lo, hi, sink, own=own)
    torch.testing.assert_close(got.double(), weights, atol=1e-7, rtol=2e-6)
    sees = (hi > lo).expand_as(top)
    assert torch.equal(facts.top[sees].double(), top[sees])
    for found, want in ((facts.total, total), (facts.on_keys, share), (facts.spread, spread)):
        torch.testing.assert_close(found.double(), want, atol=1e-6, rtol=3e-6)
    torch.testing.assert_close(facts.away.double(), away, atol=1e-6, rtol=3e-6)
    torch.testing.assert_close(facts.sums.double(), weights.sum(1), atol=1e-6, rtol=3e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    st.integers(1, 3), st.sampled_from([1, 5, 12, 13, 50, 70]), st.sampled_from([1, 63, 64, 65, 130, 300]), st.sampled_from([0, 1, 64, 100]),
    st.sampled_from([1, 3, 16, 40, 64]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_logits_made_in_place(variant: str, heads: int, rows: int, width: int, first: int, dim: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(heads, rows, dim, generator=g), torch.randn(first + width, dim, generator=g)
    lo = torch.randint(-3, width, (rows,), generator=g)
    hi = torch.maximum(torch.randint(0, width + 4, (rows,), generator=g), lo)
    x = (q.double() @ keys[first:].double().T).float()
    weights, *_ = expected(x, lo.clamp(min=0), hi.clamp(max=width), None, 0)
    got = torch.full_like(x, torch.nan)  # what stood there before does not matter
    with on(variant):
        softmax_rows_(got, lo, hi, products=Products(q, pack_keys(keys), first))
    torch.testing.assert_close(got.double(), weights, atol=1e-6, rtol=1e-5)


def test_products_that_do_not_fit_are_refused() -> None:
    x, zero, ten = torch.zeros(1, 2, 10), torch.zeros(2, dtype=torch.long), torch.full((2,), 10)
    keys = pack_keys(torch.zeros(10, 4))
    for products in (
        Products(torch.zeros(1, 3, 4), keys, 0),
        Products(torch.zeros(1, 2, 5), keys, 0),
        Products(torch.zeros(1, 2, 4), keys, 60),
    ):
        with pytest.raises(ShapeError, match="products has"):
            softmax_rows_(x, zero, ten, products=products)


def test_many_threads_give_the_same_bits(isa: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 77, 1000, generator=g)
    lo, hi = torch.zeros(77, dtype=torch.long), torch.arange(924, 1001)
    before = torch.get_num_threads()
    found: list[tuple[Tensor, ...]] = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            weights = x.clone()
            found.append((*softmax_rows_(weights, lo, hi), weights))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_huge_gaps_and_hidden_logits(isa: str) -> None:
    x = torch.full((1, 2, 40), -1e30)
    x[0, 0, 3], x[0, 0, 9] = 5.0, -200.0
    facts = softmax_rows_(x, torch.zeros(2, dtype=torch.long), torch.full((2,), 40), None, -5e29)
    assert x[0, 0, 3] == 1 and x[0].sum() == 1 and not x[0, 1].any()
    assert facts.spread[0, 0].abs() < 1e-30 and facts.total[0].tolist() == pytest.approx([1.0, 1.0], rel=1e-7)


@pytest.mark.parametrize("width", [1, 5, 40])
def test_nan_is_not_hidden(isa: str, width: int) -> None:
    x = torch.zeros(1, 2, width)
    x[0, 1, width // 2] = torch.nan
    softmax_rows_(x, torch.zeros(2, dtype=torch.long), torch.full((2,), width))
    assert x[0, 0].isfinite().all() and x[0, 1].isnan().any()


def test_bounds_outside_the_block_are_cut(isa: str) -> None:
    x = torch.zeros(1, 2, 10)
    softmax_rows_(x, torch.tensor([-5, 4]), torch.tensor([5, 99]))
    assert x[0, 0].tolist() == pytest.approx([0.2] * 5 + [0.0] * 5)
    assert x[0, 1].tolist() == pytest.approx([0.0] * 4 + [1 / 6] * 6)


def test_wrong_tensors_are_refused() -> None:
    zero, ten = torch.zeros(2, dtype=torch.long), torch.full((2,), 10)
    with pytest.raises(ShapeError, match="contiguous float32"):
        softmax_rows_(torch.zeros(1, 2, 10, dtype=torch.float64), zero, ten)
    with pytest.raises(ShapeError, match="contiguous float32"):
        softmax_rows_(torch.zeros(1, 2, 20)[..., :10], zero, ten)
    with pytest.raises(ShapeError, match="lo is"):
        softmax_rows_(torch.zeros(1, 2, 10), zero[:1], ten)
    with pytest.raises(ShapeError, match="sink has shape"):
        softmax_rows_(torch.zeros(1, 2, 10), zero, ten, torch.zeros(2))
