"""Compiled FlexAttention against the reference; few shapes, because each one compiles."""

from __future__ import annotations

import pytest
import torch

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.layouts import block_mask
from foveal.kernels import flex
from foveal.kernels.call import AttentionCall
from foveal.patterns import SlidingWindow

from ..support import assert_close

pytestmark = pytest.mark.skipif(flex.unavailable() is not None, reason=str(flex.unavailable()))

DIM = 32


def qkv(q_len: int, kv_len: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    return [torch.randn(2, *size, generator=make) for size in ((4, q_len, DIM), (2, kv_len, DIM), (2, kv_len, DIM))]


def test_options_equal_the_reference() -> None:
    q, k, v = qkv(140, 200)  # bottom-right: the rows come after 60 cached keys
    options = {"scale": -0.7, "softcap": 1.5, "bias": torch.linspace(-2, 2, 4 * 7).view(4, 7)}
    got, expected = (
        foveal.attention(q, k, v, SlidingWindow(20, sinks=3), causal=True, impl=impl, **options)
        for impl in ("flex", "reference")
    )
    assert_close(got, expected, 1e-5)


def test_blind_rows_whole_tiles_and_heads() -> None:
    q, k, v = qkv(200, 200)
    kinds = torch.tensor([[[[0, 0], [1, 2]], [[2, 0], [0, 0]], [[1, 0], [0, 1]], [[2, 2], [0, 2]]]], dtype=torch.int8)
    mask = block_mask(kinds, (128, 128), (200, 200), lambda b, h, q, k: (q + k) % 3 == 0)
    got, expected = (foveal.attention(q, k, v, mask, impl=impl) for impl in ("flex", "reference"))
    assert_close(got, expected, 1e-5)
    assert (got[:, 0, :128] == 0).all()


def test_dense_with_a_mask_that_sdpa_would_materialise() -> None:
    q, k, v = qkv(9, 40)
    got, expected = (foveal.attention(q, k, v, causal=True, impl=impl) for impl in ("flex", "reference"))
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_small_heads_are_refused_where_the_compiled_kernel_is_wrong(
    capability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    q, k, v = (torch.zeros(1, 1, 9, 16) for _ in range(3))
    base = BaseMask.build(9, 9, causal=True)
    wrong = [r for r in flex.refusals(AttentionCall(q, k, v, None, base, 1.0, return_lse=False)) if "wrong values" in r]
    assert bool(wrong) == (capability == "AVX2")
    large = torch.zeros(1, 1, 9, 24)
    assert not flex.refusals(AttentionCall(large, large, large, None, base, 1.0, return_lse=False))
