"""The selective scan: chunked equals the definition, forward and gradients, with states in and out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError
from foveal.kernels import selective_scan as module
from foveal.kernels.selective_scan import CHUNK, reference, selective_scan

LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK)


def problem(
    batch: int, length: int, channels: int, states: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, dt, A, B, C, state."""
    g = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    sequence = (batch, length)
    dt, a = torch.nn.functional.softplus(r(*sequence, channels)), -torch.exp(r(channels, states))
    return [r(*sequence, channels), dt, a, r(*sequence, states), r(*sequence, states), r(batch, channels, states)]


def by_loops(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """One number after the other."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for d in range(x.shape[2]):
            h = [float(s) for s in state[b, d]]
            for t in range(x.shape[1]):
                for n in range(A.shape[1]):
                    h[n] = float(torch.exp(dt[b, t, d] * A[d, n])) * h[n] + float(dt[b, t, d] * x[b, t, d] * B[b, t, n])
                y[b, t, d] = sum(h[n] * float(C[b, t, n]) for n in range(A.shape[1]))
    return y


def test_the_definition_is_the_recurrence():
    inputs = problem(2, 7, 3, 2)
    torch.testing.assert_close(reference(*inputs)[0], by_loops(*inputs), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", LENGTHS)
def test_identity_5_chunked_equals_the_sequential_loop_in_float32(length):
    inputs = problem(2, length, 5, 4, dtype=torch.float32)
    for got, expected in zip(selective_scan(*inputs), reference(*inputs), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    length=st.one_of(st.integers(0, 40), st.sampled_from([CHUNK, CHUNK + 1, 3 * CHUNK + 5])),
    channels=st.integers(1, 4),
    states=st.integers(1, 5),
    tile=st.sampled_from([1, 24, 200, 1 << 16]),
    seed=st.integers(0, 1000),
)
def test_any_cut_gives_the_definition_forward_and_backward(batch, length, channels, states, tile, seed):
    """``tile`` decides how many rows and chunks are worked on at once: one of each, few, and all."""
    inputs = [t.requires_grad_() for t in problem(batch, length, channels, states, seed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_tile", lambda device: tile)
        got = selective_scan(*inputs)
        expected = reference(*inputs)
        weights = [torch.randn_like(t) for t in got]
        grads = [
            torch.autograd.grad(
                sum((t * w).sum() for t, w in zip(out, weights, strict=True)), inputs, allow_unused=True
            )
            for out in (got, expected)
        ]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    for one, other in zip(*grads, strict=True):
        other = torch.zeros_like(one) if other is None else other  # plain autograd does not reach what has no elements
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


def test_gradcheck_in_float64():
    inputs = [t.requires_grad_() for t in problem(2, CHUNK + 3, 2, 2)]
    assert torch.autograd.gradcheck(selective_scan, inputs, fast_mode=True)


@pytest.mark.parametrize("cuts", [(1,) * 20, (13, 1, 150), (CHUNK, CHUNK, 3)])
def test_state_in_and_out_continues_the_sequence(cuts):
    *sequence, state = problem(2, sum(cuts), 3, 4)
    y, last = selective_scan(*sequence, state)
    x, dt, a, b, c = sequence
    parts = []
    for piece in zip(*(t.split(cuts, 1) for t in (x, dt, b, c)), strict=True):
        out, state = selective_scan(piece[0], piece[1], a, piece[2], piece[3], state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), y, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=1e-12, rtol=1e-12)


def test_the_future_changes_nothing_in_the_past_bitwise():
    x, *rest = problem(1, 3 * CHUNK, 4, 4, dtype=torch.float32)
    other = x.clone()
    other[:, 100:] += 1
    first, second = selective_scan(x, *rest)[0], selective_scan(other, *rest)[0]
    assert torch.equal(first[:, :100], second[:, :100]) and not torch.equal(first[:, 100:], second[:, 100:])


def test_strong_decays_neither_overflow_nor_turn_into_nan():
    """Inverse decays would be exp(+6400) here."""
    x, dt, a, b, c, state = problem(1, 4 * CHUNK, 3, 4, dtype=torch.float32)
    inputs = [t.requires_grad_() for t in (x, dt + 100, a - 1, b, c, state)]
    y, last = selective_scan(*inputs)
    torch.testing.assert_close(y, reference(*inputs)[0], atol=1e-3, rtol=1e-5)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.sum() + last.sum(), inputs))


def test_what_is_kept_for_the_backward_pass_is_one_state_per_chunk():
    length, channels, states = 16 * CHUNK, 32, 16
    inputs = [t.requires_grad_() for t in problem(1, length, channels, states)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        selective_scan(*inputs)
    assert max(kept) <= max(16 * channels * states, length * channels)
    assert sum(kept) < length * channels * states / 4, "all states would be this four times"


def test_non_contiguous_inputs():
    x, dt, a, b, c, state = problem(2, 70, 4, 3)
    strided = [t.mT.contiguous().mT for t in (x, dt, a, b, c, state)]
    assert not any(t.is_contiguous() for t in strided)
    for got, expected in zip(selective_scan(*strided), selective_scan(x, dt, a, b, c, state), strict=True):
        assert torch.equal(got, expected)


def test_half_precision_is_computed_in_float32():
    inputs = problem(1, 100, 4, 4, dtype=torch.bfloat16)
    y, last = selective_scan(*inputs)
    assert y.dtype == torch.bfloat16 and last.dtype == torch.float32
    expected, exact = reference(*inputs)
    torch.testing.assert_close(last, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y, expected, atol=1e-2, rtol=1e-2)


def test_autocast_changes_nothing():
    inputs = [t.requires_grad_() for t in problem(1, 100, 4, 4, dtype=torch.float32)]
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, last = selective_scan(*inputs)
            found.append([y, last, *torch.autograd.grad(y.sum() + last.sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_operator_keeps_torchs_contract():
    inputs = [t.requires_grad_() for t in problem(2, CHUNK + 1, 3, 2)]
    torch.library.opcheck(torch.ops.foveal.selective_scan.default, inputs)


def test_compiled_equals_eager():
    inputs = [t.requires_grad_() for t in problem(1, 70, 3, 2)]
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    got, expected = compiled(*inputs), selective_scan(*inputs)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(y.sum(), inputs) for y, _ in (got, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3)}, ShapeError, "batch, length, channels"),
        ({"A": torch.zeros(5, 2)}, ShapeError, "channels=3"),
        ({"B": torch.zeros(1, 4, 3)}, ShapeError, r"B has shape \(1, 4, 3\); expected \(1, 4, 2\)"),
        ({"state": torch.zeros(2, 3, 2)}, ShapeError, "state has shape"),
        ({"dt": torch.zeros(1, 4, 3, dtype=torch.long)}, ShapeError, "dt is torch.int64"),
        ({"impl": "chunkd"}, ConfigError, "Did you mean 'chunked'"),
    ],
)
def test_bad_input_is_named(change, error, words):
    names = ("x", "dt", "A", "B", "C", "state")
    with pytest.raises(error, match=words):
        selective_scan(**{**dict(zip(names, problem(1, 4, 3, 2, dtype=torch.float32), strict=True)), **change})
