"""Parts of an attention: rows and keys picked out, under every mask a host may demand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.base_mask import BaseMask
from foveal.kernels.call import AttentionCall
from foveal.kernels.key_groups import partial, positions
from foveal.patterns import SlidingWindow
from tests.support import Host, context, tensors

HOSTS = [
    Host(9, 9), Host(3, 11), Host(1, 7), Host(8, 8, pads=((3, 0), (0, 0))), Host(7, 7, causal=False), Host(10, 10, window=4),
    Host(9, 9, documents=((4, 5), (9,))),
]  # fmt: skip


def dense(call: AttentionCall, rows: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, one softmax over what is visible and picked."""
    k, v = (t.repeat_interleave(call.groups, 1) for t in (call.k, call.v))
    seen = call.base.dense(call.q.shape[0])[:, None]
    if keys is not None:
        seen = seen & keys[:, None, None]
    logits = (call.q @ k.mT * call.scale).masked_fill(~seen, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(logits, -1))
    lse = torch.logsumexp(logits, -1)
    out = weights @ v
    at = rows[:, None].expand(*lse.shape[:2], -1)
    return out.gather(2, at[..., None].expand(*at.shape, v.shape[-1])), lse.gather(2, at)


@given(st.sampled_from(HOSTS), st.integers(0, 99), st.sampled_from(["auto", "reference", "gather"]))
def test_equals_the_definition(host: Host, seed: int, impl: str) -> None:
    q, k, v = tensors(host, seed=seed)
    call = AttentionCall(q, k, v, None, host.base(), 0.6)
    g = torch.Generator().manual_seed(seed)
    member = torch.rand(host.batch, host.q_len, generator=g) < 0.6
    keys = torch.rand(host.batch, host.kv_len, generator=g) < 0.4
    rows, real = positions(member)
    for chosen in (keys, None, torch.zeros_like(keys)):
        out, lse = partial(call, rows, real, chosen, impl)
        want, want_lse = dense(call, rows, chosen)
        assert torch.allclose(out, want * real[:, None, :, None], atol=1e-12)
        assert torch.allclose(lse, want_lse.masked_fill(~real[:, None], -torch.inf), atol=1e-12)


@given(st.sampled_from(HOSTS[:3]), st.integers(0, 99))
def test_sparse_layouts_and_predicates(host: Host, seed: int) -> None:
    q, k, v = tensors(host, seed=seed)
    base = host.base()
    layout, _ = SlidingWindow(window=3, sinks=1).select(q, k, context(host), None)
    sparse = AttentionCall(q, k, v, layout, base, 0.6)
    own = torch.arange(host.q_len)[:, None] + base.shift
    key = torch.arange(host.kv_len)[None]
    kept = (own - key < 3) | (key < 1)

    def predicate(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((i + base.shift - j) < 3) | (j < 1)

    filtered = BaseMask.build(host.q_len, host.kv_len, causal=True, predicate=predicate)
    assert bool((filtered.dense()[0] == (kept & base.dense()[0])).all())
    keys = torch.rand(host.batch, host.kv_len, generator=torch.Generator().manual_seed(seed)) < 0.5
    rows, real = positions(torch.ones(host.batch, host.q_len, dtype=torch.bool))
    by_layout = partial(sparse, rows, real, keys)
    by_predicate = partial(sparse.replace(layout=None, base=filtered), rows, real, keys)
    want = dense(sparse.replace(layout=None, base=filtered), rows, keys)
    for got in (by_layout, by_predicate):
        assert torch.allclose(got[0], want[0], atol=1e-12) and torch.allclose(got[1], want[1], atol=1e-12)


def test_learned_sinks_enter_the_log_sum_exp() -> None:
    host = Host(5, 5)
    q, k, v = tensors(host)
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    rows, real = positions(torch.ones(1, 5, dtype=torch.bool))
    call = AttentionCall(q, k, v, None, host.base(), 0.6)
    _, lse = partial(call, rows, real, None)
    _, with_sinks = partial(call, rows, real, None, sinks=sinks)
    assert torch.allclose(with_sinks, torch.logaddexp(lse, sinks[None, :, None]))


@pytest.mark.parametrize("member", [[[True, False, True], [False, False, False]], [[False] * 3]])
def test_positions(member: list[list[bool]]) -> None:
    flags = torch.tensor(member)
    index, real = positions(flags)
    assert [i[r].tolist() for i, r in zip(index, real, strict=True)] == [row.nonzero()[:, 0].tolist() for row in flags]
