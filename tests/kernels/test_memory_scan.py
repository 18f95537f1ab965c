"""The neural-memory scan: the chunk form is the sequential rule, which is the paper's rule written with autograd here."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError
from foveal.kernels.memory_scan import ACTIVATIONS, MemoryState, gradients, memory_scan, read

B, H, N, D, DV, WIDE = 2, 2, 17, 4, 3, 5
LINEAR, DEEP, DEEPER = ((DV, D),), ((WIDE, D), (DV, WIDE)), ((WIDE, D), (6, WIDE), (DV, 6))
SHAPES = pytest.mark.parametrize("shapes", [LINEAR, DEEP, DEEPER], ids=["linear", "two", "three"])


def weights(shapes=DEEP, seed: int = 9, batch: int = B, dtype=torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, H, o, i, generator=g, dtype=torch.float64).to(dtype) / i**0.5 for o, i in shapes)


def tokens(n: int = N, seed: int = 0, batch: int = B) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    q, k = (
        torch.nn.functional.normalize(torch.randn(batch, H, n, D, generator=g, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    v = torch.randn(batch, H, n, DV, generator=g, dtype=torch.float64)
    alpha, eta, theta = (torch.rand(batch, H, n, generator=g, dtype=torch.float64) for _ in range(3))
    return q, k, v, 0.3 * alpha, 0.9 * eta, 0.3 * theta


def by_autograd(q, k, v, alpha, eta, theta, start, chunk, activation="gelu", clip=None, valid=None):
    """Token by token, the gradient of ``‖M(k) − v‖²`` from autograd."""

    def memory(ws, x):
        for i, w in enumerate(ws):
            x = w @ x
            x = ACTIVATIONS[activation][0](x) if i < len(ws) - 1 else x
        return x

    now = [w.clone() for w in start]
    s = [torch.zeros_like(w) for w in start]
    out = torch.zeros(*q.shape[:3], start[-1].shape[2], dtype=q.dtype)
    for t in range(q.shape[2]):
        if t % chunk == 0:
            reference = [w.detach().clone() for w in now]
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                if valid is None or valid[b, t]:
                    ref = [w[b, h].clone().requires_grad_() for w in reference]
                    loss = (memory(ref, k[b, h, t]) - v[b, h, t]).square().sum()
                    grads = torch.autograd.grad(loss, ref)
                    norm = float(sum(g.square().sum() for g in grads).sqrt())
                    scale = 1.0 if clip is None else min(1.0, clip / norm)
                    for i, g in enumerate(grads):
                        s[i][b, h] = eta[b, h, t] * s[i][b, h] - theta[b, h, t] * scale * g
                        now[i][b, h] = (1 - alpha[b, h, t]) * now[i][b, h] + s[i][b, h]
                out[b, h, t] = memory([w[b, h] for w in now], q[b, h, t])
    return out, now, s


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@SHAPES
@pytest.mark.parametrize("chunk", [1, 3, 4, 5, N])
def test_identity_1_dual_form_equals_the_sequential_rule(shapes, chunk):
    start = MemoryState.start(weights(shapes), chunk)
    one, two = (memory_scan(*tokens(), start, impl=impl) for impl in ("chunked", "sequential"))
    close(one.out, two.out)
    close(one.surprise, two.surprise)
    for name in ("weights", "momentum", "reference"):
        close(getattr(one.state, name), getattr(two.state, name))
    assert one.state.position == two.state.position == N % chunk


@SHAPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_identity_5_the_sequential_rule_is_autograd_of_the_loss(shapes, activation, clip):
    given = tokens()
    out, now, s = by_autograd(*given, weights(shapes), 4, activation, clip)
    for impl in ("chunked", "sequential"):
        got = memory_scan(*given, MemoryState.start(weights(shapes), 4), activation=activation, clip=clip, impl=impl)
        close(got.out, out)
        close(list(got.state.weights), now)
        close(list(got.state.momentum), s)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 9),
    st.integers(1, 3),
    st.lists(st.integers(1, 6), max_size=3),
    st.integers(0, 99),
)
def test_chunk_form_and_gradients_on_random_shapes(n, chunk, dv, hidden, seed):
    g = torch.Generator().manual_seed(seed)
    sizes = [D, *hidden, dv]
    start = [torch.randn(B, H, o, i, generator=g, dtype=torch.float64) / i for i, o in pairwise(sizes)]
    q, k, _, *gates = tokens(n, seed)
    v = torch.randn(B, H, n, dv, generator=g, dtype=torch.float64)
    found = []
    for impl, recompute in (("sequential", False), ("chunked", False), ("chunked", True)):
        leaves = [t.detach().clone().requires_grad_() for t in (q, k, v, *gates, *start)]
        got = memory_scan(*leaves[:6], MemoryState.start(tuple(leaves[6:]), chunk), impl=impl, recompute=recompute)
        weight = torch.linspace(-1, 1, got.out.numel(), dtype=torch.float64).view_as(got.out)
        total = (got.out * weight).sum() + sum((w * w).sum() for w in (*got.state.weights, *got.state.momentum))
        found.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shapes", [LINEAR, DEEP], ids=["linear", "two"])
def test_identity_5_outer_gradients(shapes):
    def run(*leaves):
        got = memory_scan(*leaves[:6], MemoryState.start(tuple(leaves[6:]), 2))
        return got.out, *got.state.weights

    leaves = [t[:1, :1].detach().requires_grad_() for t in (*tokens(3), *weights(shapes))]
    assert torch.autograd.gradcheck(run, leaves)


@SHAPES
@pytest.mark.parametrize("cuts", [(1,) * N, (4, 8, 5), (3, 1, 13), (16, 1)])
@pytest.mark.parametrize("impl", ["chunked", "sequential"])
def test_identity_2_pieces_with_a_carried_state_equal_one_call(shapes, cuts, impl):
    start = MemoryState.start(weights(shapes), 4)
    whole = memory_scan(*tokens(), start)
    state, outs, at = start, [], 0
    for n in cuts:
        got = memory_scan(*(t[:, :, at : at + n] for t in tokens()), state, impl=impl)
        state, at = MemoryState.from_state_dict(got.state.state_dict()), at + n
        outs.append(got.out)
    close(torch.cat(outs, 2), whole.out)
    for name in ("weights", "momentum", "reference"):
        close(getattr(state, name), getattr(whole.state, name))


def constant(**values):
    q, k, v, *gates = tokens()
    return (q, k, v, *(torch.full_like(gates[0], values[n]) for n in ("alpha", "eta", "theta")))


@pytest.mark.parametrize("impl", ["chunked", "sequential"])
def test_identity_3_without_momentum_and_forgetting_it_is_deltanet_with_step_2_theta(impl):
    q, k, v, alpha, eta, theta = constant(alpha=0.0, eta=0.0, theta=0.3)
    (m,) = weights(LINEAR)
    got = memory_scan(q, k, v, alpha, eta, theta, MemoryState.start((m,), 1), impl=impl)
    for t in range(N):
        key, value = k[:, :, t, :, None], v[:, :, t, :, None]
        m = m - 2 * 0.3 * (m @ key - value) @ key.mT
        close(got.out[:, :, t, :, None], m @ q[:, :, t, :, None])


def test_identity_3_with_forgetting_it_is_not_gated_deltanet():
    alpha, theta = 0.2, 0.3
    given = constant(alpha=alpha, eta=0.0, theta=theta)
    (m,) = weights(LINEAR)
    got = memory_scan(*(t[:, :, :1] for t in given), MemoryState.start((m,), 1)).state.weights[0]
    key, value = given[1][:, :, 0, :, None], given[2][:, :, 0, :, None]
    ours = (1 - alpha) * m - 2 * theta * (m @ key - value) @ key.mT
    decayed = (1 - alpha) * m
    gated_deltanet = decayed - 2 * theta * (decayed @ key - value) @ key.mT
    close(got, ours)
    close(ours - gated_deltanet, -2 * alpha * theta * m @ key @ key.mT)
    assert float((ours - gated_deltanet).abs().max()) > 1e-3


@SHAPES
@pytest.mark.parametrize("impl", ["chunked", "sequential"])
def test_identity_4_limits_of_the_gates(shapes, impl):
    def final(**values):
        return memory_scan(*constant(**values), MemoryState.start(weights(shapes), 4), impl=impl).state

    still = final(alpha=0.1, eta=0.5, theta=0.0)
    close(still.weights, tuple(0.9**N * w for w in weights(shapes)))
    forgets = final(alpha=1.0, eta=0.5, theta=0.1)
    close(forgets.weights, forgets.momentum)
    plain = final(alpha=0.1, eta=0.0, theta=0.1)
    errors, inputs = gradients(
        *(t[:, :, -1:] for t in constant(alpha=0, eta=0, theta=0)[1:3]), _before_last(shapes), "gelu"
    )
    close(plain.momentum, tuple(-0.1 * e.mT @ x for e, x in zip(errors, inputs, strict=True)))


def _before_last(shapes):
    """The reference of the last token: N = 17 begins a chunk of 4 with it."""
    given = tuple(t[:, :, :-1] for t in constant(alpha=0.1, eta=0.0, theta=0.1))
    return memory_scan(*given, MemoryState.start(weights(shapes), 4)).state.weights


@SHAPES
def test_identity_6_the_future_does_not_reach_the_past(shapes):
    given = tokens()
    other = [t.clone() for t in given]
    for t in other:
        t[:, :, 9] *= 0.5
    start = MemoryState.start(weights(shapes), 4)
    one, two = memory_scan(*given, start).out, memory_scan(*other, start).out
    assert torch.equal(one[:, :, :8], two[:, :, :8]) and torch.allclose(one[:, :, 8], two[:, :, 8], atol=1e-14)
    assert not torch.equal(one[:, :, 9:], two[:, :, 9:])


def test_identity_8_orthonormal_keys_are_learned():
    keys = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    k = keys.expand(1, H, D, D).repeat(1, 1, 60, 1)
    v = torch.randn(D, DV, generator=torch.Generator().manual_seed(1), dtype=torch.float64).expand(1, H, D, DV)
    zero = torch.zeros(1, H, 60 * D, dtype=torch.float64)
    got = memory_scan(
        k, k, v.repeat(1, 1, 60, 1), zero, zero, zero + 0.3, MemoryState.start(weights(LINEAR, batch=1), D)
    )
    close(read(keys.expand(1, H, D, D), got.state.weights), v, 1e-9)


def test_identity_9_rows_and_heads_keep_memories_of_their_own():
    given = tokens()
    both = memory_scan(*given, MemoryState.start(weights(), 4))
    for b in range(B):
        alone = memory_scan(
            *(t[b : b + 1] for t in given), MemoryState.start(tuple(w[b : b + 1] for w in weights()), 4)
        )
        close(alone.out, both.out[b : b + 1])
    start = MemoryState.start(weights(), 4)
    first = memory_scan(*given, start).out
    memory_scan(*tokens(seed=5), start)
    assert torch.equal(memory_scan(*given, start).out, first), "a state is never changed in place"


@pytest.mark.parametrize("impl", ["chunked", "sequential"])
def test_padding_moves_nothing(impl):
    given, valid = tokens(), torch.rand(B, N, generator=torch.Generator().manual_seed(4)) < 0.6
    out, now, s = by_autograd(*given, weights(), 4, valid=valid)
    got = memory_scan(*given, MemoryState.start(weights(), 4), valid=valid, impl=impl)
    close(got.out, out)
    close(list(got.state.weights), now)
    close(list(got.state.momentum), s)
    assert bool((got.surprise[~valid[:, None].expand(-1, H, -1)] == 0).all())


def test_stability_is_where_the_sheet_says():
    """Unit keys, no forgetting, one token a chunk: steps below 1 stay bounded, above 1 explode."""
    g = torch.Generator().manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 400, 16, generator=g, dtype=torch.float64), dim=-1)
    v = torch.randn(1, 1, 400, 16, generator=g, dtype=torch.float64)
    zero = torch.zeros(1, 1, 400, dtype=torch.float64)
    growth = []
    for theta in (0.9, 1.1):
        start = MemoryState.start((torch.zeros(1, 1, 16, 16, dtype=torch.float64),), 1)
        norms = []
        for n in (100, 400):
            given = (t[:, :, :n] for t in (k, k, v, zero, zero, zero + theta))
            norms.append(float(memory_scan(*given, start).state.weights[0].norm()))
        growth.append(norms[1] / norms[0])
    assert growth[0] < 2 and growth[1] > 10


def test_a_larger_chunk_is_another_model():
    outs = [memory_scan(*tokens(), MemoryState.start(weights(), b)).out for b in (1, 4)]
    assert float((outs[0] - outs[1]).norm() / outs[0].norm()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_its_states_in_float32(dtype):
    exact = memory_scan(*tokens(64), MemoryState.start(weights(), 16))
    given = [t.to(dtype) for t in tokens(64)]
    with torch.autocast("cpu", torch.bfloat16):
        got = memory_scan(*given, MemoryState.start(weights(dtype=torch.float32), 16))
    assert got.out.dtype == dtype and got.state.weights[0].dtype == torch.float32
    error = float((got.out.double() - exact.out).abs().max() / exact.out.abs().max())
    assert error < (1e-5 if dtype == torch.float32 else 0.03), error


def test_views_and_empty_sequences():
    given = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tokens()]
    start = MemoryState.start(weights(), 4)
    assert torch.equal(memory_scan(*given, start).out, memory_scan(*tokens(), start).out)
    nothing = memory_scan(*(t[:, :, :0] for t in given), start)
    assert nothing.out.shape == (B, H, 0, DV) and nothing.state.position == 0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"activation": "gleu"}, ConfigError, "Did you mean 'gelu'"),
        ({"impl": "chunk"}, ConfigError, "Did you mean 'chunked'"),
        ({"clip": 0.0}, ConfigError, "clip is 0.0"),
        ({"k": torch.zeros(B, H, N, 3)}, ShapeError, r"\(2, 2, 17, 3\)"),
        ({"alpha": torch.zeros(B, N)}, ShapeError, "alpha has shape"),
        ({"valid": torch.ones(B, 3, dtype=torch.bool)}, ShapeError, "valid"),
        ({"state": MemoryState.start(weights(((DV, D + 1),)), 4)}, ShapeError, "from 4 to 3 channels"),
        ({"state": MemoryState.start(weights(batch=1), 4)}, ShapeError, "B=2"),
        ({"state": MemoryState.start(weights(dtype=torch.float32), 4)}, ShapeError, "float64"),
        ({"state": MemoryState.start(weights(), 0)}, ConfigError, "chunk is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named(changes, error, words):
    names = ("q", "k", "v", "alpha", "eta", "theta")
    fields = {**dict(zip(names, tokens(), strict=True)), "state": MemoryState.start(weights(), 4), **changes}
    with pytest.raises(error, match=words):
        memory_scan(**fields)
