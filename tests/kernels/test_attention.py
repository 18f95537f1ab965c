"""``reference`` and ``gather`` on random calls: against a loop over tokens, and against each other with all gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveal
from foveal.core.layouts import Groups
from foveal.kernels import gather, rows
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute, missing

from ..strategies import Call, calls, finite, hosts, random_blocks, random_groups, random_lists
from ..support import assert_close, loop

pytestmark = pytest.mark.usefixtures("poison")
KINDS = pytest.mark.parametrize("kind", ["dense", "blocks", "lists", "groups"])


def attend(call: Call, impl: str, **changes: Any) -> tuple[Tensor, Tensor]:
    return foveal.attention(
        call.q,
        call.k,
        call.v,
        call.layout,
        causal=call.causal,
        impl=impl,
        return_lse=True,
        **{**call.options, **changes},
    )


def solve(call: Call, impl: str) -> dict[str, Tensor]:
    """Out, lse, and gradients of a loss that reads both."""
    leaves = {name: t.clone().requires_grad_() for name, t in call.leaves().items()}
    options = {**call.options, **{n: leaves[n] for n in ("bias", "sink_logits") if n in leaves}}
    out, lse = attend(Call(leaves["q"], leaves["k"], leaves["v"], call.layout, call.causal, options), impl)
    make = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=make, dtype=t.dtype) for t in (out, lse)]
    loss = (out * weights[0]).sum() + (finite(lse) * weights[1]).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zero = {name: torch.zeros_like(t) for name, t in leaves.items()}
    found = {f"gradient of {n}": zero[n] if g is None else g for n, g in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **found}


@KINDS
@settings(max_examples=25)
@given(data=st.data())
def test_reference_equals_the_loop(kind: str, data: st.DataObject) -> None:
    call = data.draw(calls(kind, longest=20))
    out, lse, _ = loop(call.q, call.k, call.v, call.layout, call.host, **call.options)
    got_out, got_lse = attend(call, "reference")
    assert_close(got_out, out, what="out")
    assert_close(got_lse, lse, what="lse")


@KINDS
@pytest.mark.parametrize(
    ("batch_size", "keys"),
    [(1 << 6, rows.KEYS_AT_ONCE), (1 << 8, 4), (gather.CPU_SCORES, rows.KEYS_AT_ONCE)],
    ids=["small batches", "keys in parts", "default"],
)
@settings(max_examples=30)
@given(data=st.data())
def test_gather_equals_the_reference(kind: str, batch_size: int, keys: int, data: st.DataObject) -> None:
    call = data.draw(calls(kind))
    with mock.patch.object(gather, "CPU_SCORES", batch_size), mock.patch.object(rows, "KEYS_AT_ONCE", keys):
        expected, got = solve(call, "reference"), solve(call, "gather")
    for name, value in expected.items():
        assert_close(got[name], value, 1e-9, name)


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=10)
@given(data=st.data())
def test_half_precision_is_summed_in_float32(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    call = data.draw(calls(kind))
    call.options.update(bias=None, sink_logits=None)
    low = [t.to(dtype) for t in (call.q, call.k, call.v)]
    exact, exact_lse = attend(Call(*(t.double() for t in low), call.layout, call.causal, call.options), "reference")
    out, lse = attend(Call(*low, call.layout, call.causal, call.options), "gather")
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    rounding = (
        0.5 if not isinstance(call.layout, Groups) else 2.0
    )  # one rounding of the result; groups are joined from rounded parts
    error = (out.double() - exact).abs()
    assert bool((error <= rounding * torch.finfo(dtype).eps * exact.abs().clamp(min=1) + 1e-4).all()), (
        f"off by {error.max():.3g}"
    )
    assert_close(lse, exact_lse, 1e-5, "lse")


@KINDS
@settings(max_examples=25)
@given(data=st.data())
def test_one_new_token(kind: str, data: st.DataObject) -> None:
    call = data.draw(calls(kind, rows=1))
    expected, got = solve(call, "reference"), solve(call, "gather")
    for name, value in expected.items():
        assert_close(got[name], value, 1e-9, name)
    for value, other in zip(attend(call, "gather"), (expected["out"], expected["lse"]), strict=True):
        assert_close(value, other, what="without gradients")


@KINDS
@settings(max_examples=30)
@given(data=st.data())
def test_every_demand_of_a_host_meets_every_layout(kind: str, data: st.DataObject) -> None:
    call = data.draw(calls(kind, longest=30))
    batch, heads, q_len = call.q.shape[:3]
    host = data.draw(hosts((q_len, call.k.shape[2]), batch))
    base = host.base()
    if data.draw(st.booleans()):
        table = torch.rand(batch, q_len, host.kv_len, generator=torch.Generator().manual_seed(heads)) < 0.6
        base.predicate, base.plain = lambda b, h, q, k: table[b, q, k], False
        base.cache["predicate_batch"] = batch
    options = {"softcap": call.options["softcap"], "bias": call.options["bias"]}
    expected, got = (
        compute(AttentionCall(call.q, call.k, call.v, call.layout, base, 0.7, **options), impl)
        for impl in ("reference", "gather")
    )
    for a, b in zip(got, expected, strict=True):
        assert a is not None
        assert b is not None
        assert_close(a, b, 1e-9)


def test_one_new_token_reads_a_strided_cache() -> None:
    make = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 1, 8, generator=make)
    lists = random_lists(make, 2, 4, 1, 30, 1, 12, True)
    cache = torch.randn(
        2, 50, 2, 2, 8, generator=make
    )  # (batch, tokens, k or v, heads, head_dim), longer than what is filled
    k, v = cache[:, 7:37, 0].transpose(1, 2), cache[:, 7:37, 1].transpose(1, 2)
    views = [
        (k, v),
        (k[..., ::2], v),
        (k[:, :1].expand(-1, 2, -1, -1), v),
        (k[:1].expand(2, -1, -1, -1), v[..., :1]),
        (k, v[..., ::3]),
    ]
    for k_view, v_view in views:
        q_view = q[..., : k_view.shape[-1]]
        expected = foveal.attention(q_view, k_view.contiguous(), v_view.contiguous(), lists, impl="reference")
        assert_close(foveal.attention(q_view, k_view, v_view, lists, impl="gather"), expected, 1e-5)


@settings(max_examples=40)
@given(calls())
def test_blind_rows_are_zero_everywhere(call: Call) -> None:
    call.options["sink_logits"] = None
    *_, seen = loop(call.q, call.k, call.v, call.layout, call.host)
    blind = ~(seen > 0).any(-1)
    got = solve(call, "gather")
    assert (got["out"][blind] == 0).all()
    assert (got["lse"][blind] == -torch.inf).all()
    assert torch.isfinite(got["lse"][~blind]).all()
    assert (got["gradient of q"][blind] == 0).all()
    assert all(torch.isfinite(t).all() for name, t in got.items() if name != "lse")


@settings(max_examples=30)
@given(calls())
def test_sinks_are_a_key_without_a_value(call: Call) -> None:
    sinks = call.options["sink_logits"] = torch.linspace(-2, 2, call.q.shape[1], dtype=torch.float64)
    out, lse = attend(call, "gather")
    plain, plain_lse = attend(call, "gather", sink_logits=None)
    share = torch.sigmoid(plain_lse - sinks[:, None])  # of the softmax's mass that real keys keep
    assert_close(out, plain * share[..., None])
    assert_close(lse, torch.logaddexp(plain_lse, sinks[:, None].expand_as(plain_lse)))


@pytest.mark.parametrize("kind", ["blocks", "lists", "groups"])
def test_two_runs_are_bitwise_equal_on_two_threads(kind: str) -> None:
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 130, 16, generator=make) for heads in (4, 2, 2))
    layout = {
        "blocks": lambda: random_blocks(make, 2, 4, 130, 130, (32, 32), True),
        "lists": lambda: random_lists(make, 2, 4, 130, 130, 16, 100, True),
        "groups": lambda: random_groups(make, (2, 4, 2, 130, 130), 12, True, "softmax"),
    }[kind]()
    call = Call(q, k, v, layout, True, {"bias": None, "sink_logits": None})
    torch.set_num_threads(2)
    first, second = solve(call, "gather"), solve(call, "gather")
    torch.set_num_threads(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


@settings(max_examples=20)
@given(calls())
def test_a_causal_call_is_the_mask_and_causality(call: Call) -> None:
    call.options["sink_logits"], call.options["bias"] = None, None
    call.causal = True
    out = attend(call, "gather")[0]
    t, ahead = call.q.shape[2] // 2, max(0, call.k.shape[2] - call.q.shape[2] + call.q.shape[2] // 2)
    call.k[:, :, ahead + 1 :] += 10
    call.v[:, :, ahead + 1 :] -= 10
    assert_close(attend(call, "gather")[0][:, :, : t + 1], out[:, :, : t + 1], 1e-12, "rows whose keys did not change")


@pytest.mark.parametrize("combine", ["softmax", "mean"])
def test_a_key_in_two_groups_counts_once_per_group(combine: Any) -> None:
    q, k, v = torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 2, 1), torch.tensor([[[[1.0], [4.0]]]])
    groups = Groups(
        torch.tensor([0, 0]), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 3]), False, combine
    )
    for impl in ("reference", "gather"):
        out, lse = foveal.attention(q, k, v, groups, impl=impl, return_lse=True)
        assert out.item() == pytest.approx({"softmax": 2.0, "mean": (1 + 2.5) / 2}[combine])
        assert lse.item() == pytest.approx(torch.tensor(3.0).log().item())


@pytest.mark.parametrize(
    "impl",
    [
        "reference",
        "gather",
        "auto",
        pytest.param("native", marks=pytest.mark.skipif(missing("native") is not None, reason="not built")),
    ],
)
@pytest.mark.parametrize("size", [(0, 5, 5), (1, 0, 5), (1, 5, 0), (1, 1, 0), (1, 0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_tensors(impl: str, size: tuple[int, int, int], causal: bool) -> None:
    batch, q_len, kv_len = size
    q, k, v = (torch.randn(batch, 2, n, 4, requires_grad=True) for n in (q_len, kv_len, kv_len))
    out = foveal.attention(q, k, v, causal=causal, impl=impl)
    assert out.shape == q.shape
    assert (out == 0).all()
    out.sum().backward()
    assert all(t.grad is not None and (t.grad == 0).all() for t in (q, k, v))
    out, lse = foveal.attention(q, k, v, causal=causal, impl=impl, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("scale", [0.0, -1.3])
def test_an_explicit_scale_is_honoured_by_auto(scale: float) -> None:
    q, k, v = (
        torch.randn(1, 2, 300, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)
    )
    for causal in (False, True):
        expected = foveal.attention(q, k, v, causal=causal, scale=scale, impl="reference")
        assert_close(foveal.attention(q, k, v, causal=causal, scale=scale), expected)
