"""``merge`` joins attentions over parts of the keys into attention over all of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import foveal
from foveal.core.errors import ShapeError

from ..support import assert_close


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    pieces = [
        foveal.attention(q, k[:, :, a:b], v[:, :, a:b], return_lse=True, impl="gather")
        for a, b in zip([0, *cuts], [*cuts, k.shape[2]], strict=True)
    ]
    return [p[0] for p in pieces], [p[1] for p in pieces]


@given(st.lists(st.integers(0, 23), max_size=4), st.integers(0, 99))
def test_merged_parts_equal_the_whole_with_gradients(cuts: list[int], seed: int) -> None:
    size = (1, 2, 23, 5)
    q, k, v = (random(*size, seed=seed + i).requires_grad_() for i in range(3))
    weight = random(1, 2, 23, seed=seed + 7)
    out, lse = foveal.merge(*parts(q, k, v, sorted(cuts)))
    whole, whole_lse = foveal.attention(q, k, v, return_lse=True, impl="reference")
    assert_close(out.detach(), whole.detach())
    assert_close(lse.detach(), whole_lse.detach())
    losses = [(o.square().sum() + (part * weight).sum()) for o, part in ((out, lse), (whole, whole_lse))]
    for got, expected in zip(*(torch.autograd.grad(loss, (q, k, v)) for loss in losses), strict=True):
        assert_close(got, expected, what="gradient through out and lse")


@given(st.integers(0, 99))
def test_merge_is_associative_and_commutative(seed: int) -> None:
    outs = [random(2, 3, 4, seed=seed + i) for i in range(3)]
    lses = [3 * random(2, 3, seed=seed + 5 + i) for i in range(3)]
    lses[seed % 3][0] = -torch.inf
    at_once = foveal.merge(outs, lses)
    left = foveal.merge(outs[:2], lses[:2])
    for other in (foveal.merge([left[0], outs[2]], [left[1], lses[2]]), foveal.merge(outs[::-1], lses[::-1])):
        assert_close(other[0], at_once[0])
        assert_close(other[1], at_once[1])


def test_one_part_is_itself() -> None:
    out, lse = random(2, 4), random(2)
    assert_close(foveal.merge([out], [lse])[0], out)
    assert_close(foveal.merge([out], [lse])[1], lse)


def test_parts_that_see_nothing_count_for_nothing() -> None:
    outs = [random(3, 4).requires_grad_(), random(3, 4, seed=1).requires_grad_()]
    lses = [
        torch.tensor([0.5, -torch.inf, -torch.inf], dtype=torch.float64),
        torch.tensor([-torch.inf, 1.0, -torch.inf], dtype=torch.float64),
    ]
    lses = [part.requires_grad_() for part in lses]
    out, lse = foveal.merge(outs, lses)
    assert_close(out.detach(), torch.stack([outs[0][0], outs[1][1], torch.zeros(4, dtype=torch.float64)]).detach())
    assert lse.tolist() == [0.5, 1.0, -torch.inf]
    (out.sum() + lse[:2].sum()).backward()
    for t in (*outs, *lses):
        assert t.grad is not None
        assert torch.isfinite(t.grad).all()


def test_large_scores_do_not_overflow() -> None:
    out, lse = foveal.merge([torch.ones(1, 1), 3 * torch.ones(1, 1)], [torch.tensor([1e4]), torch.tensor([1e4])])
    assert out.item() == pytest.approx(2.0)
    assert lse.item() == pytest.approx(1e4 + torch.tensor(2.0).log().item())


def test_low_precision_parts_are_joined_in_float32() -> None:
    outs = [random(64, 4, seed=i).bfloat16() for i in range(2)]
    lses = [random(64, seed=5 + i).float() for i in range(2)]
    out, lse = foveal.merge(outs, lses)
    exact, _ = foveal.merge([o.double() for o in outs], [part.double() for part in lses])
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, exact.bfloat16())


def test_errors_name_the_argument() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ShapeError, match="1 outs and 2 lses"):
        foveal.merge([out], [lse, lse])
    with pytest.raises(ShapeError, match="at least one"):
        foveal.merge([], [])
    with pytest.raises(ShapeError, match=r"outs\[1\].*\(2, 4, 4\).*lses\[1\].*\(2, 3\)"):
        foveal.merge([out, torch.zeros(2, 4, 4)], [lse, lse])
