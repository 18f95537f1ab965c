"""The FlexAttention column: the same pairs as foveal's own attention, or why there is none."""

from __future__ import annotations

import pytest
import torch

import foveal
from foveal.bench.flex import flex_job
from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.core.layouts import KeySelection
from foveal.kernels import flex
from foveal.patterns import BlockTopK


def tensors(length: int = 300) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, length, 32, generator=g) for heads in (4, 2, 2))


@pytest.mark.skipif(flex.unavailable() is not None, reason=str(flex.unavailable()))
def test_the_column_attends_over_the_same_pairs() -> None:
    q, k, v = tensors()
    base = BaseMask.build(300, 300, causal=True)
    layout = BlockTopK(Budget(density=0.4)).select(q, k, SelectContext(base), None)[0]
    job, what = flex_job(q, k, v, layout, base)
    assert job is not None and torch.__version__ in what
    with torch.no_grad():
        expected = foveal.attention(q, k, v, layout, causal=True, impl="reference")
        assert (expected - foveal.attention(q, k, v, causal=True)).abs().max() > 1e-2
        torch.testing.assert_close(job(), expected, rtol=0, atol=2e-6)


def test_a_key_list_has_no_column_and_the_reason_is_named() -> None:
    q, k, v = tensors(8)
    layout = KeySelection(torch.zeros(1, 1, 8, 1, dtype=torch.int64), 1)
    job, what = flex_job(q, k, v, layout, BaseMask.build(8, 8, causal=True))
    assert (job is None and what.endswith("KeySelection")) or what == flex.unavailable()
