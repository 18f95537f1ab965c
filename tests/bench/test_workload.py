"""Work and truth of a benchmark case: operations, and float64 on some rows against float64 on all."""

from __future__ import annotations

import math

import pytest
import torch

from foveal.bench.masks import parse_mask
from foveal.bench.workload import BACKWARD, FORWARD, Heads, Work, flops, sampled_rows, truth


def work(mask: str, length: int, direction: str = BACKWARD, heads: Heads | None = None, dtype=torch.float64) -> Work:
    heads = heads or Heads(4, 2, 8)
    return Work.make(parse_mask(mask).draw(length, heads.kv_heads), heads, dtype, direction, seed=3)


def attend(own: Work) -> torch.Tensor:
    """All rows at once, in the tensors' dtype."""
    mask = own.mask.dense()
    seen = mask if mask.shape[0] == 1 else mask.repeat_interleave(own.groups, 0)
    k, v = (t.repeat_interleave(own.groups, 1) for t in (own.k, own.v))
    return torch.softmax((own.q @ k.mT * own.q.shape[-1] ** -0.5).masked_fill(~seen, -math.inf), -1) @ v


def test_10_operations_of_the_published_formula() -> None:
    case = work("full", 1024, FORWARD, Heads(1, 1, 1), torch.float32)
    assert case.flops == 4 * 2**20
    assert work("full", 1024, BACKWARD, Heads(1, 1, 1), torch.float32).flops == 10 * 2**20
    assert flops(10, 8, FORWARD) + flops(10, 8, BACKWARD) == 3.5 * flops(10, 8, FORWARD)


@pytest.mark.parametrize(
    "mask", ["causal", "share_question", "global_sliding:window=9", "uniform_block_sparse:block=32"]
)
@pytest.mark.parametrize("length", [40, 200])
def test_truth_on_some_rows_is_the_whole_on_these_rows(mask: str, length: int) -> None:
    own = work(mask, length)
    right = truth(own)
    out = attend(own)
    assert right.error(out) < 1e-13
    assert right.upstream is not None
    outside = torch.ones(length, dtype=torch.bool)
    outside[right.rows] = False
    assert not right.upstream[:, :, outside].any()
    grads = torch.autograd.grad(out, (own.q, own.k, own.v), right.upstream)
    assert right.grad_error(grads) < 1e-12


@pytest.mark.parametrize("which", range(3))
def test_a_wrong_gradient_is_noticed(which: int) -> None:
    own = work("causal", 130)
    right = truth(own)
    grads = list(torch.autograd.grad(attend(own), (own.q, own.k, own.v), right.upstream))
    grads[which] = grads[which] * 1.01
    assert 0.005 < right.grad_error(tuple(grads)) < 0.02
    grads[which] = grads[which] * math.nan
    assert right.grad_error(tuple(grads)) == math.inf


def test_a_neighbouring_mask_is_noticed() -> None:
    """One key more or less per row is far outside any tolerance."""
    own, other = work("causal_sliding:window=20", 300, FORWARD), work("causal_sliding:window=21", 300, FORWARD)
    assert truth(own).error(attend(other)) > 0.05


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 129, 5000])
def test_sampled_rows(length: int) -> None:
    rows = sampled_rows(length).tolist()
    assert rows == sorted(set(rows)) and len(rows) == min(length, 64) and rows[0] == 0 and rows[-1] == length - 1
    assert rows == sampled_rows(length).tolist()
    assert {127, 128} <= set(rows) or length < 129


def test_heads_last_holds_the_same_numbers() -> None:
    own = work("full", 12)
    moved = own.heads_last()
    assert torch.equal(moved.q, own.q) and moved.q.transpose(1, 2).is_contiguous() and moved.q.is_leaf
    assert moved.k.requires_grad and torch.equal(moved.upstream, own.upstream)
