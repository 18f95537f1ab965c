"""Toeplitz products: FFT = matrix, adjoints, precision where single precision loses rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError
from foveal.kernels import toeplitz
from foveal.kernels.toeplitz import amplification, choose, toeplitz_matmul, toeplitz_reference, visible


def case(q_len: int, k_len: int, heads: int = 2, width: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(heads, q_len + k_len - 1, generator=g, dtype=torch.float64)
    return c, torch.randn(2, heads, k_len, width, generator=g, dtype=torch.float64)


def test_the_reference_is_the_sum_over_offsets() -> None:
    c, a = case(4, 6)
    for causal in (False, True):
        wanted = torch.zeros(2, 2, 4, 3, dtype=torch.float64)
        for i in range(4):
            for j in range(6):
                if not causal or j - i <= 6 - 4:
                    wanted[:, :, i] += c[:, j - i + 3, None] * a[:, :, j]
        torch.testing.assert_close(toeplitz_reference(c, a, causal=causal), wanted)


@given(
    q_len=st.sampled_from([1, 2, 7, 63, 64, 65, 200]),
    k_len=st.sampled_from([1, 2, 64, 130]),
    causal=st.booleans(),
    precision=st.sampled_from(["auto", "float64", "dense"]),
    seed=st.integers(0, 99),
)
def test_identity_3_equals_the_matrix_forward_and_backward(
    q_len: int, k_len: int, causal: bool, precision: toeplitz.Precision, seed: int
) -> None:
    c, a = (x.requires_grad_() for x in case(q_len, k_len, seed=seed))
    exact = toeplitz_reference(c, a, causal=causal)
    got = toeplitz_matmul(c, a, causal=causal, precision=precision)
    torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for x, y in zip(
        torch.autograd.grad(got, (c, a), upstream), torch.autograd.grad(exact, (c, a), upstream), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


def test_identity_3_the_adjoint_is_the_product_with_the_reversed_table() -> None:
    c, a = case(100, 100)
    y = torch.randn(a.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    there = (toeplitz_matmul(c, a, precision="float64") * y).sum()
    back = (toeplitz_matmul(c.flip(-1), y, precision="float64") * a).sum()
    torch.testing.assert_close(there, back)


@pytest.mark.parametrize("precision", ["float64", "dense"])
def test_identity_3_one_offset_shifts_the_sequence(precision: toeplitz.Precision) -> None:
    n = 90
    _, a = case(n, n)
    c = torch.zeros(1, 2 * n - 1, dtype=torch.float64)
    c[0, n - 2] = 1.0  # δ = −1
    got = toeplitz_matmul(c, a, precision=precision)
    torch.testing.assert_close(got[:, :, 1:], a[:, :, :-1])
    assert float(got[:, :, 0].abs().max()) < 1e-14


def test_one_table_for_all_heads_gathers_all_gradients() -> None:
    c, a = case(80, 80)
    one = c[:1].clone().requires_grad_()
    many = c[:1].expand(2, -1).clone().requires_grad_()
    for table in (one, many):
        toeplitz_matmul(table, a, precision="float64").square().sum().backward()
    assert one.grad is not None and many.grad is not None
    torch.testing.assert_close(one.grad[0], many.grad.sum(0))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    c, a = case(70, 90)
    whole = [toeplitz_matmul(c, a, precision=p) for p in ("float64", "dense")]
    monkeypatch.setattr(toeplitz, "BUFFER", 1)
    monkeypatch.setattr(toeplitz, "DENSE_BUFFER", 1)
    for before, p in zip(whole, ("float64", "dense"), strict=True):
        torch.testing.assert_close(toeplitz_matmul(c, a, precision=p), before)


def positive(spread: float, causal: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """A table exp(b), positive terms, the exact row sums, and what float32 loses of the worst row."""
    n = 512
    g = torch.Generator().manual_seed(0)
    b = torch.randn(1, 2 * n - 1, generator=g) * spread
    c = visible((b - b.max()).exp(), n, causal)
    a = torch.rand(1, 1, n, 2, generator=g)
    exact = toeplitz_reference(c, a, causal=causal)
    lost = (toeplitz_matmul(c, a, causal=causal, precision="float32").double() / exact - 1).abs().max()
    return c, a, exact, float(lost)


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_auto_takes_float64_where_float32_loses_rows(spread: float) -> None:
    c, a, exact, lost = positive(spread, causal=True)
    assert lost > 1e-6 and choose(c, 512, "auto", torch.float32) == "float64"
    kept = (toeplitz_matmul(c, a, causal=True).double() / exact - 1).abs().max()
    assert float(kept) < 2e-7, "only the rounding of the output is left"


def test_auto_stays_in_float32_where_that_is_enough() -> None:
    c, _, _, lost = positive(1.0, causal=False)
    assert lost < 1e-5 and choose(c, 512, "auto", torch.float32) == "float32"


def test_auto_goes_dense_and_says_so_where_no_transform_is_enough() -> None:
    c, a, exact, _ = positive(10.0, causal=True)
    with pytest.warns(UserWarning, match="dense O\\(n²\\) product runs instead"):
        got = toeplitz_matmul(c, a, causal=True)
    assert float((got.double() / exact - 1).abs().max()) < 1e-5


@pytest.mark.parametrize("width", [1, 5, 20, 37])
def test_amplification_finds_the_smallest_row(width: int) -> None:
    table = torch.rand(2, 37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = table.unfold(-1, width, 1).sum(-1)
    wanted = (table.square().sum(-1).sqrt() * width**0.5 / rows.amin(-1)).max()
    assert amplification(table, 37 - width + 1) == pytest.approx(float(wanted))
    assert torch.equal(toeplitz._window_max(table, width), table.unfold(-1, width, 1).amax(-1))


def test_lengths_are_long_enough_and_smooth() -> None:
    for n in range(1, 300):
        length = toeplitz.transform_length(n)
        assert n <= length <= 1.34 * n
        for prime in (2, 3, 5):
            while length % prime == 0:
                length //= prime
        assert length == 1


def test_half_precision_is_transformed_in_float32() -> None:
    c, a = case(100, 100)
    exact = toeplitz_reference(c, a.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got = toeplitz_matmul(c.float(), a.bfloat16())
    assert got.dtype == torch.bfloat16
    assert float((got.double() - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


def test_gradcheck() -> None:
    c, a = case(5, 4)
    torch.autograd.gradcheck(
        lambda c, a: toeplitz_matmul(c, a, precision="float64"), (c.requires_grad_(), a.requires_grad_())
    )


def test_bad_tables_are_told() -> None:
    c, a = case(9, 9)
    with pytest.raises(ShapeError, match=r"floating \(heads or 1, Nq \+ Nk − 1\)"):
        toeplitz_matmul(c[:, :8], a)
    with pytest.raises(ShapeError, match="expected c"):
        toeplitz_matmul(c.repeat(2, 1)[:3], a)
    with pytest.raises(ConfigError, match="Did you mean 'float64'"):
        toeplitz_matmul(c, a, precision="float65")  # type: ignore[arg-type]
