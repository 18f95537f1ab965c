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


@pytest.mark.parametrize("rows", [16, 32, 48, 64, 96, 128, 256])
@pytest.mark.parametrize("keys", [16, 48, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_tiles_of_the_cuda_kernel_divide_the_blocks(rows: int, keys: int, dtype: torch.dtype, head_dim: int) -> None:
    """Torch's own tiles may have 128 rows and keys; with smaller blocks it fails to compile."""
    assert not flex.tile_refusals((rows, keys), needs_grad=False)
    options = flex.kernel_options(500, (rows, keys), head_dim, dtype)
    if options is None:
        assert rows % 128 == keys % 128 == 0
    else:
        assert rows % options["BLOCK_M"] == keys % options["BLOCK_N"] == 0
        assert min(options["BLOCK_M"], options["BLOCK_N"]) >= flex.SMALLEST_TILE
    assert flex.kernel_options(127, (rows, keys), head_dim, dtype) is not None


def test_blocks_that_the_cuda_kernels_do_not_take() -> None:
    assert flex.tile_refusals((128, 8), needs_grad=False) and flex.tile_refusals((20, 128), needs_grad=False)
    assert not flex.tile_refusals((128, 128), needs_grad=True)
    assert "gradients" in flex.tile_refusals((128, 64), needs_grad=True)[0]


def test_more_shapes_than_torch_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its limit torch would run FlexAttention uncompiled, which stores all scores and ignores which blocks are kept."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    function = torch.compile(flex.flex.flex_attention, dynamic=False, backend=backend)
    monkeypatch.setattr(flex, "_compiled", lambda: function)
    limit = torch._dynamo.config.recompile_limit
    for length in range(20, 22 + limit):
        q, k, v = qkv(length, length)
        foveal.attention(q, k, v, causal=True, impl="flex")
    assert len(compiled) == limit + 2 and torch._dynamo.config.recompile_limit == limit
