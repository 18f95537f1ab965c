"""The Triton kernels against the reference, run on CPU by Triton's interpreter, and compiled for a GPU without one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.errors import UnsupportedError
from foveal.core.layouts import Groups, KeySelection
from foveal.kernels import triton
from foveal.patterns import SlidingWindow

from ..strategies import Call, calls, finite, hosts, random_groups, random_lists
from ..support import allocated_peak, assert_close
from .compare import attend, check, check_demand, check_gradients, check_under, gradients, lowered, random_call

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(triton.unavailable() is not None, reason=f"triton: {triton.unavailable()}"),
    pytest.mark.skipif(not triton.interpreted(), reason="on a GPU tests/gpu runs these kernels"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
"""Not bfloat16: the interpreter multiplies its bits."""
KINDS = pytest.mark.parametrize("kind", ["lists", "groups"])


def plain(call: Call) -> Call:
    """Without what the kernels do not take."""
    call.options["bias"] = None
    return call


def both(call: Call, dtype: torch.dtype) -> None:
    check(call, dtype, "triton")
    check_gradients(call, dtype, "triton")


@KINDS
@DTYPES
@settings(max_examples=10)
@given(data=st.data())
def test_random_calls(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    both(plain(data.draw(calls(kind, longest=24))), dtype)


@KINDS
@settings(max_examples=10)
@given(data=st.data())
def test_every_demand_of_a_host(kind: str, data: st.DataObject) -> None:
    call = plain(data.draw(calls(kind, longest=24)))
    host = data.draw(hosts((call.q.shape[2], call.k.shape[2]), call.q.shape[0]))
    check_demand(host.base(), call, "triton")


@pytest.mark.parametrize("sizes", [(63, 63, 16, 16), (64, 64, 64, 64), (65, 65, 33, 17), (40, 97, 160, 16)], ids=str)
@DTYPES
def test_edges_of_tiles(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """Lists and groups of one length, just below, at and above what a program takes; wide heads take smaller tiles."""
    q_len, kv_len, dim, dim_v = sizes
    call = (1, 2, 1, q_len, kv_len, dim, dim_v)
    lists = KeySelection(torch.arange(kv_len).view(1, 1, 1, -1), q_len)
    rows, keys = torch.arange(q_len), torch.arange(kv_len)
    groups = Groups(rows, torch.tensor([0, q_len]), keys, torch.tensor([0, kv_len]))
    for layout in (lists, groups):
        both(random_call(0, call, layout, causal=q_len == kv_len), dtype)


@pytest.mark.parametrize("of_heads", [1, 2, 6])
@pytest.mark.parametrize("block", [1, 7, 70])
def test_lists_of_heads_that_share_keys(block: int, of_heads: int) -> None:
    """Blocks of one row, of fewer rows than a tile, and of more."""
    rows = 5 if block == 1 else 75
    lists = random_lists(torch.Generator().manual_seed(2), 2, of_heads, rows, 90, block, 40, True)
    both(random_call(1, (2, 6, 2, rows, 90, 16, 16), lists, scale=-0.3, softcap=2.0), torch.float32)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("combine", ["softmax", "mean"])
def test_queries_in_several_groups(combine: str, per_head: bool) -> None:
    groups = random_groups(torch.Generator().manual_seed(3), (2, 6, 2, 90, 80), 7, per_head, combine)
    both(random_call(2, (2, 6, 2, 90, 80, 16, 24), groups, causal=False, softcap=2.0), torch.float32)


@pytest.mark.parametrize("keys", [255, 256, 257, 700])
def test_long_lists_of_one_new_token_are_split(keys: int) -> None:
    index = torch.randperm(900, generator=torch.Generator().manual_seed(4))[:keys].view(1, 1, 1, -1)
    both(random_call(4, (1, 2, 1, 1, 900, 16, 16), KeySelection(index, 1)), torch.float32)


def test_padding_among_listed_keys() -> None:
    valid = torch.arange(120)[None] != torch.tensor([[40], [7]])
    lists = random_lists(torch.Generator().manual_seed(5), 2, 2, 100, 120, 32, 60, False)
    check_under(
        BaseMask.build(100, 120, causal=True, valid=valid), random_call(5, (2, 2, 1, 100, 120, 16, 16), lists), "triton"
    )


def test_rows_that_see_nothing() -> None:
    q, k, v = (torch.randn(1, 1, 20, 16, requires_grad=True) for _ in range(3))
    for layout in (
        KeySelection(torch.full((1, 1, 2, 5), -1), 10),
        KeySelection(torch.full((1, 1, 2, 0), 0), 10),
        Groups(torch.arange(4), torch.tensor([0, 4]), torch.arange(0), torch.tensor([0, 0])),
        Groups(torch.arange(0), torch.tensor([0]), torch.arange(0), torch.tensor([0])),
    ):
        out, lse = foveal.attention(q, k, v, layout, impl="triton", return_lse=True)
        assert (out == 0).all() and (lse == -torch.inf).all()
        for grad in torch.autograd.grad(out.sum(), (q, k, v)):
            assert (grad == 0).all()


def test_strides_of_the_inputs_do_not_matter() -> None:
    lists = random_lists(torch.Generator().manual_seed(6), 1, 2, 40, 50, 16, 20, False)
    low, _ = lowered(random_call(6, (1, 2, 2, 40, 50, 16, 16), lists), torch.float32)
    turned = Call(
        *(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (low.q, low.k, low.v)), lists, True, low.options
    )
    for a, b in zip(attend(low, "triton"), attend(turned, "triton"), strict=True):
        assert torch.equal(a, b)
    for name, grad in gradients(low, "triton").items():
        assert torch.equal(grad, gradients(turned, "triton")[name])


def test_a_part_of_a_cache_is_read_where_it_lies() -> None:
    """One step over the first keys of a longer cache: nothing of the cache's size is copied, and what lies behind is not read."""
    cache = torch.full((1, 2, 4096, 16), torch.nan)
    cache[:, :, :3000] = torch.randn(1, 2, 3000, 16, generator=torch.Generator().manual_seed(8))
    part, q = cache[:, :, :3000], torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(9))
    lists = KeySelection(torch.arange(0, 3000, 100).view(1, 1, 1, -1), 1)
    out = foveal.attention(q, part, part, lists, impl="triton")
    assert_close(out, foveal.attention(q, part, part, lists, impl="reference"), 1e-5)
    assert allocated_peak(lambda: foveal.attention(q, part, part, lists, impl="triton")) < part.numel()


def test_large_logits_stay_finite() -> None:
    lists = KeySelection(torch.arange(50).view(1, 1, 1, -1), 40)
    call = random_call(7, (1, 1, 1, 40, 50, 16, 16), lists, scale=60.0)
    check(call, torch.float32, "triton")
    low, _ = lowered(call, torch.float32)
    assert all(grad.isfinite().all() for grad in gradients(low, "triton").values())


def test_refusals_name_their_reason() -> None:
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    lists = KeySelection(torch.arange(20).view(1, 1, 1, -1), 20)

    def refused(reason: str, *tensors: torch.Tensor, mask: Any = lists, **options: Any) -> None:
        with pytest.raises(UnsupportedError, match=reason):
            foveal.attention(*tensors, mask, impl="triton", **options)

    refused("float32 or lower", q.double(), k.double(), v.double())
    refused("relative-position bias", q, k, v, bias=torch.zeros(1, 3))
    refused("the call is dense", q, k, v, mask=None)
    refused("a BlockMask, which FlexAttention", q, k, v, mask=SlidingWindow(9), causal=True)
    refused("head dimensions up to 256", *(torch.randn(1, 1, 20, 257) for _ in range(3)))
    many = torch.zeros(40000, 2, 1, 16)
    refused("up to 65535 sequences times heads", *(many,) * 3, mask=KeySelection(torch.zeros(1, 2, 1, 1).long(), 1))
    refused("at least one sequence, row and key", *(x[:0] for x in (q, k, v)))


def test_on_cpu_it_is_never_chosen() -> None:
    q, k, v = (torch.randn(1, 1, 20, 16) for _ in range(3))
    assert foveal.explain(q, k, v, KeySelection(torch.arange(20).view(1, 1, 1, -1), 20)).impl != "triton"


def test_kernels_compile_for_a_gpu() -> None:
    """By Triton's own compiler and ptxas, for a GPU of compute capability 9.0; the script looks at registers and shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.compiled", "128", "256"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2 * 3 * 2 * 4


def test_only_the_gradients_that_are_asked_for() -> None:
    lists = random_lists(torch.Generator().manual_seed(10), 1, 2, 40, 50, 16, 20, False)
    low, _ = lowered(random_call(10, (1, 2, 2, 40, 50, 16, 16), lists), torch.float32)
    expected = gradients(low, "triton")
    for name in ("q", "k", "v"):
        leaves = {n: t.clone().requires_grad_(n == name) for n, t in (("q", low.q), ("k", low.k), ("v", low.v))}
        make = torch.Generator().manual_seed(9)
        out, lse = attend(Call(*leaves.values(), lists, True, low.options), "triton")
        weights = [torch.randn(t.shape, generator=make, dtype=torch.float64).float() for t in (out, lse)]
        ((out * weights[0]).sum() + (finite(lse) * weights[1]).sum()).backward()
        assert torch.equal(leaves[name].grad, expected[name])
