"""The C++ kernels against the reference: every layout that they take, edges of tiles, every instruction set of this machine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveal
from foveal.core.errors import ShapeError, UnsupportedError
from foveal.core.layouts import BlockMask, Layout, block_mask
from foveal.kernels import native
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute

from ..strategies import Call, calls, finite, hosts, random_blocks
from ..support import Host, assert_close

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(native.unavailable() is not None, reason=f"native {native.unavailable()}"),
]
KINDS = pytest.mark.parametrize("kind", ["dense", "blocks"])
VARIANTS = [] if native.unavailable() else native._native.variants()


@pytest.fixture(params=VARIANTS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn."""
    before = native._native.variant()
    native._native.choose(request.param)
    yield request.param
    native._native.choose(before)


def attend(call: Call, impl: str, **changes: Any) -> tuple[Tensor, Tensor]:
    options = {**call.options, **changes}
    return foveal.attention(
        call.q, call.k, call.v, call.layout, causal=call.causal, impl=impl, return_lse=True, **options
    )


def lowered(call: Call, dtype: torch.dtype) -> tuple[Call, Call]:
    """The call in ``dtype``, and in float64 with the same rounded values."""
    low = [t.to(dtype) for t in (call.q, call.k, call.v)]
    options = {n: t.to(dtype) if isinstance(t, Tensor) else t for n, t in call.options.items()}
    exact = {n: t.double() if isinstance(t, Tensor) else t for n, t in options.items()}
    return (
        Call(*low, call.layout, call.causal, options),
        Call(*(t.double() for t in low), call.layout, call.causal, exact),
    )


def random_call(
    seed: int, sizes: tuple[int, ...], layout: Layout | None = None, causal: bool = True, **options: Any
) -> Call:
    """``sizes`` is ``(B, H, Hkv, Nq, Nk, D, Dv)``."""
    batch, heads, kv_heads, q_len, kv_len, dim, dim_v = sizes
    make = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, dim_v))
    q, k, v = (torch.randn(batch, *shape, generator=make, dtype=torch.float64) for shape in shapes)
    return Call(q, k, v, layout, causal, {"bias": None, "sink_logits": None, **options})


def check(call: Call, dtype: torch.dtype) -> None:
    """Out and lse of ``native`` against the float64 reference on the same rounded tensors."""
    if dtype != torch.float32:
        call.options["sink_logits"] = None  # joining a sink rounds a second time
    low, exact = lowered(call, dtype)
    out, lse = attend(low, "native")
    want, want_lse = attend(exact, "reference")
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close(lse, want_lse, 2e-5, "lse")
    if dtype == torch.float32:
        return assert_close(out, want, 1e-5, "out")
    # one rounding of the result, and in bfloat16 one of every weight: at most eps/2 of the mean |v| that the row sees
    exact.v = exact.v.abs()
    weights = attend(exact, "reference")[0] if dtype == torch.bfloat16 else 0.0
    bound = torch.finfo(dtype).eps / 2 * (want.abs() + weights) + 2e-5
    assert out.isfinite().all()
    worst = ((out.double() - want).abs() / bound).max() if out.numel() else 0.0
    assert worst <= 1.0, f"off by {worst:.2f} of what rounding allows"


def gradients(call: Call, impl: str) -> dict[str, Tensor]:
    """Gradients of a loss that reads out and lse."""
    leaves = {name: t.clone().requires_grad_() for name, t in call.leaves().items() if name != "bias"}
    options = {**call.options, "sink_logits": leaves.get("sink_logits")}
    out, lse = attend(Call(leaves["q"], leaves["k"], leaves["v"], call.layout, call.causal, options), impl)
    make = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=make, dtype=torch.float64).to(call.q.dtype) for t in (out, lse)]
    loss = (out * weights[0]).sum() + (finite(lse) * weights[1]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(t) if x is None else x for (n, t), x in zip(leaves.items(), found, strict=True)}


def check_gradients(call: Call, dtype: torch.dtype) -> None:
    """Gradients against the reference's; in half precision by the size of the whole error."""
    if dtype != torch.float32:
        call.options["sink_logits"] = None
    low, exact = lowered(call, dtype)
    got, want = gradients(low, "native"), gradients(exact, "reference")
    for name, value in want.items():
        if dtype == torch.float32:
            assert_close(got[name], value, 1e-4, f"gradient of {name}")
            continue
        assert got[name].dtype == dtype
        error, size = (got[name].double() - value).norm(), value.norm()
        allowed = 2 * torch.finfo(dtype).eps * size + 1e-3 * math.sqrt(value.numel())
        assert error <= allowed, f"gradient of {name} is off by {error / size:.3g} of its size"


@KINDS
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_gradients_of_random_calls(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    check_gradients(data.draw(calls(kind)), dtype)


@KINDS
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_random_calls(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    check(data.draw(calls(kind)), dtype)


SIZES = [
    (1, 1, 1, 1, 1, 16, 16),
    (1, 1, 1, 63, 63, 64, 64),
    (1, 1, 1, 64, 64, 64, 64),
    (2, 1, 1, 65, 65, 64, 64),
    (1, 2, 1, 95, 127, 64, 64),
    (1, 2, 2, 97, 129, 32, 80),
    (1, 3, 1, 128, 191, 33, 17),
    (1, 1, 1, 129, 257, 128, 128),
    (1, 2, 1, 7, 320, 256, 256),
    (1, 1, 1, 200, 70, 96, 192),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
def test_edges_of_tiles_on_every_instruction_set(isa: str, sizes: tuple[int, ...], causal: bool, dtype: torch.dtype) -> None:
    check(random_call(0, sizes, causal=causal), dtype)
    check_gradients(random_call(0, sizes, causal=causal), dtype)


@pytest.mark.parametrize("tile", [(64, 64), (128, 128), (128, 64), (16, 16), (1, 8), (96, 48), (200, 130)], ids=str)
@pytest.mark.parametrize("mod", [False, True])
def test_block_masks_on_every_instruction_set(isa: str, tile: tuple[int, int], mod: bool) -> None:
    sizes = (2, 4, 2, 270, 330, 64, 48)
    mask = random_blocks(torch.Generator().manual_seed(sum(tile)), 2, 4, 270, 330, tile, mod)
    for causal in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            check(random_call(1, sizes, mask, causal), dtype)
            check_gradients(random_call(1, sizes, mask, causal), dtype)
    check(random_call(2, sizes, mask, True, softcap=1.5, scale=-0.4), torch.float32)
    check_gradients(random_call(2, sizes, mask, True, softcap=1.5, scale=-0.4), torch.float32)
