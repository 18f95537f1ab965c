"""Torch's own dense kernel, wherever it may run: out, lse, gradients, and alignment after a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveal
from foveal.core.errors import UnsupportedError
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute, refusals

from ..strategies import Call, calls
from ..support import Host, assert_close, loop, tensors
from .test_attention import attend, solve

HOSTS = {
    "square": Host(40, 40),
    "bidirectional": Host(40, 30, causal=False),
    "decode": Host(1, 30),
    "decode from a static cache": Host(1, 30, shift=11),
    "static cache, first chunk": Host(20, 30, shift=0),
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_equals_the_loop(host: Host, return_lse: bool) -> None:
    q, k, v = tensors(host, dim=8, dim_v=8)
    out, lse = compute(AttentionCall(q, k, v, None, host.base(), 0.4, return_lse=return_lse), "sdpa")
    expected, expected_lse, _ = loop(q, k, v, None, host, scale=0.4)
    assert_close(out, expected)
    assert (lse is not None) == return_lse
    if lse is not None:
        assert_close(lse, expected_lse)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        (Host(20, 30), "causal chunk after a cache"),
        (Host(30, 30, window=4), "N×N"),
        (Host(30, 30, pads=((3, 0),)), "N×N"),
        (Host(30, 30, documents=((10, 20),)), "N×N"),
    ],
    ids=str,
)
def test_masks_that_it_would_materialise_are_refused(host: Host, reason: str) -> None:
    q, k, v = tensors(host)
    with pytest.raises(UnsupportedError, match=reason):
        compute(AttentionCall(q, k, v, None, host.base(), 1.0), "sdpa")


@given(calls("dense"), st.booleans())
def test_whatever_it_accepts_is_right(call: Call, with_lse: bool) -> None:
    plain: dict[str, Any] = {"softcap": None, "bias": None}
    call.options.update(plain)
    made = foveal.kernels.dispatch.prepare(
        call.q, call.k, call.v, causal=call.causal, scale=call.options["scale"], return_lse=with_lse
    )
    if refusals("sdpa", made):
        return
    out, lse = compute(made, "sdpa")
    expected, expected_lse = attend(call, "reference", sink_logits=None)
    assert_close(out, expected)
    if with_lse:
        assert lse is not None
        assert_close(lse, expected_lse)


@given(calls("dense"))
def test_auto_equals_the_reference_with_all_gradients(call: Call) -> None:
    expected, got = solve(call, "reference"), solve(call, "auto")
    for name, value in expected.items():
        assert_close(got[name], value, 1e-9, name)


def test_gradients_of_the_plain_path() -> None:
    call = Call(*tensors(Host(30, 30), dim_v=8), None, True, {"bias": None, "sink_logits": None})
    leaves = [t.clone().requires_grad_() for t in (call.q, call.k, call.v)]
    got, expected = (
        torch.autograd.grad(foveal.attention(*leaves, causal=True, impl=impl).square().sum(), leaves)
        for impl in ("sdpa", "reference")
    )
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
