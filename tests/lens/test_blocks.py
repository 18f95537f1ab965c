"""Blocks of rows, put together, are the matrix of weights: any call, any host, any height of a block, any layout kept."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.kernels.call import AttentionCall
from foveal.kernels.reference import visible_pairs
from foveal.lens import blocks as module
from foveal.lens.blocks import blocks, real_rows
from foveal.lens.kept import Kept

from ..strategies import Call, calls, hosts
from ..support import Host
from .brute import brute_force

HEIGHTS = st.sampled_from([1, 30, 200, 1 << 20])


def assembled(
    call: AttentionCall, sink_logits: Tensor | None, height: int, kept: Kept | None = None, only: bool = False
) -> Tensor:
    """``(B, H, Nq, Nk)``; also checks that every row of every head comes exactly once, and the logarithms."""
    out = torch.zeros(*call.q.shape[:3], call.k.shape[2], dtype=torch.float64)
    seen = torch.zeros(call.q.shape[:3], dtype=torch.long)
    with patch.object(module, "CPU_BLOCK", height):
        for block in blocks(call, sink_logits, kept, only):
            out[block.b, block.heads, block.rows, block.keys] = block.weights
            seen[block.b, block.heads, block.rows] += 1
            there = block.weights > 1e-12
            logs = block.log_weights[there]
            torch.testing.assert_close(logs, block.weights.log()[there])
            torch.testing.assert_close(block.received, block.weights.sum(1))
    assert (seen == 1).all()
    return out


@given(calls("dense"), HEIGHTS)
@settings(max_examples=60, deadline=None)
def test_any_call(call: Call, height: int) -> None:
    c, sinks = call.prepared(), call.options["sink_logits"]
    want = brute_force(c.q, c.k, c.base, scale=c.scale, softcap=c.softcap, bias=c.bias, sink_logits=sinks)
    real = torch.stack([real_rows(c.base, b) for b in range(c.q.shape[0])])
    torch.testing.assert_close(
        assembled(c, sinks, height), want.weights * real[:, None, :, None], atol=1e-12, rtol=1e-9
    )


@given(hosts(), HEIGHTS)
@settings(max_examples=60, deadline=None)
def test_any_host(host: Host, height: int) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, host.q_len, 4, generator=g, dtype=torch.float64)
    k = torch.randn(2, 2, host.kv_len, 4, generator=g, dtype=torch.float64)
    base = host.base()
    c = AttentionCall(q, k, k, None, base, 0.5)
    seen = base.dense(2)[:, None]
    logits = torch.where(seen, q @ k.repeat_interleave(2, 1).mT * 0.5, -torch.inf)
    real = torch.stack([real_rows(base, b) for b in range(2)])
    want = torch.where(seen & real[:, None, :, None], logits.softmax(-1), 0.0)
    torch.testing.assert_close(assembled(c, None, height), want, atol=1e-12, rtol=1e-9)
    single = c.replace(q=q.float(), k=k.float(), v=k.float())  # on CPUs by the native softmax
    torch.testing.assert_close(assembled(single, None, height), want, atol=1e-5, rtol=1e-4)


@given(calls(), HEIGHTS)
@settings(max_examples=60, deadline=None)
def test_any_layout_kept(call: Call, height: int) -> None:
    c = call.prepared()
    heads = c.q.shape[1]
    pairs = visible_pairs(c)
    kept = Kept([(tuple(range(heads)), c.layout)], c.base)
    for block in blocks(c.replace(layout=None), None, kept):
        assert torch.equal(block.kept.expand_as(block.weights), pairs[block.b, block.heads, block.rows, block.keys])
    want = brute_force(c.q, c.k, c.base, scale=c.scale, softcap=c.softcap, bias=c.bias).weights * pairs
    total = want.sum(-1, keepdim=True)
    want = torch.where(total > 0, want / torch.where(total > 0, total, 1.0), 0.0)
    torch.testing.assert_close(assembled(c, None, height, kept, True), want, atol=1e-9, rtol=1e-7)
    single = c.replace(q=c.q.float(), k=c.k.float(), v=c.v.float())
    torch.testing.assert_close(assembled(single, None, height, kept, True), want, atol=1e-4, rtol=1e-3)


def test_strided_inputs() -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, 20, 4, 6, generator=g, dtype=torch.float64).transpose(1, 2)
    k = torch.randn(1, 20, 2, 6, generator=g, dtype=torch.float64).transpose(1, 2)
    base = Host(20, 20).base()
    strided, plain = (AttentionCall(a, b, b, None, base, 0.4) for a, b in ((q, k), (q.contiguous(), k.contiguous())))
    assert torch.equal(assembled(strided, None, 50), assembled(plain, None, 50))
