"""Linear attention: quadratic = chunked = one token at a time = packed, forward and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError
from foveal.kernels.linear import LinearState, linear_attention, linear_step
from foveal.kernels.linear_ragged import Pieces, linear_attention_packed

CAUSAL = pytest.mark.parametrize("causal", [False, True])
NORMALISE = pytest.mark.parametrize("normalise", [False, True])
F, DV, CHUNK = 5, 7, 8


def make(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(
    batch: int, heads: int, kv_heads: int, length: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    g = make(seed)
    return [
        torch.rand(batch, h, length, d, generator=g, dtype=torch.float64).to(dtype)
        for h, d in ((heads, F), (kv_heads, F), (kv_heads, DV))
    ]


def some_state(batch: int, kv_heads: int, seed: int = 5) -> LinearState:
    g = make(seed)
    return LinearState(
        torch.rand(batch, kv_heads, F, DV, generator=g, dtype=torch.float64),
        torch.rand(batch, kv_heads, F, generator=g, dtype=torch.float64),
    )


def by_loop(q: Tensor, k: Tensor, v: Tensor, causal: bool, normalise: bool, state: LinearState | None) -> Tensor:
    """One pair after the other; shares nothing with the library."""
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    groups = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        total, weight = torch.zeros(v.shape[-1], dtype=q.dtype), 0.0
        if state is not None:
            total += q[b, h, i] @ state.kv[b, h // groups]
            weight += float(q[b, h, i] @ state.k[b, h // groups])
        for j in range(i + 1 if causal else k.shape[2]):
            w = float(q[b, h, i] @ k[b, h // groups, j])
            total, weight = total + w * v[b, h // groups, j], weight + w
        out[b, h, i] = (total / weight if weight else total * 0) if normalise else total
    return out


def outcome(inputs: list[Tensor], run: object, seed: int = 9) -> list[Tensor]:
    """Out, states and all gradients of a random combination of them."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, state = run(*leaves[:3], LinearState(*leaves[3:]) if len(leaves) > 3 else None)  # type: ignore[operator]
    results = [out, state.kv, state.k]
    g = make(seed)
    scalar = sum((x.double() * torch.rand(x.shape, generator=g, dtype=torch.float64)).sum() for x in results)
    assert isinstance(scalar, Tensor)
    grads = torch.autograd.grad(scalar, leaves, allow_unused=True)
    return [*results, *(torch.zeros(()) if x is None else x for x in grads)]


def same(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-11) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@CAUSAL
@NORMALISE
@pytest.mark.parametrize("with_state", [False, True])
def test_the_reference_is_the_sum_over_pairs(causal: bool, normalise: bool, with_state: bool) -> None:
    q, k, v = tensors(2, 4, 2, 6)
    state = some_state(2, 2) if with_state else None
    got, _ = linear_attention(q, k, v, causal=causal, normalise=normalise, state=state, impl="reference")
    torch.testing.assert_close(got, by_loop(q, k, v, causal, normalise, state), rtol=1e-12, atol=1e-12)


@given(
    length=st.sampled_from([1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 5]),
    groups=st.integers(1, 3),
    batch=st.integers(1, 2),
    causal=st.booleans(),
    normalise=st.booleans(),
    with_state=st.booleans(),
    chunk=st.sampled_from([1, CHUNK, 64]),
    seed=st.integers(0, 99),
)
def test_chunked_equals_quadratic(
    length: int, groups: int, batch: int, causal: bool, normalise: bool, with_state: bool, chunk: int, seed: int
) -> None:
    inputs = tensors(batch, 2 * groups, 2, length, seed) + (list(some_state(batch, 2)) if with_state else [])
    fast, exact = (
        outcome(
            inputs,
            lambda q, k, v, s, impl=impl: linear_attention(
                q, k, v, causal=causal, normalise=normalise, state=s, chunk=chunk, impl=impl
            ),
        )
        for impl in ("fast", "reference")
    )
    same(fast, exact)


@pytest.mark.parametrize("slab", [1, 1 << 20])
@CAUSAL
def test_slabs_change_nothing(slab: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveal.kernels.linear_chunks.CPU_SLAB", slab)
    inputs = [*tensors(2, 4, 2, 45), *some_state(2, 2)]
    fast, exact = (
        outcome(
            inputs,
            lambda q, k, v, s, impl=impl: linear_attention(q, k, v, causal=causal, state=s, chunk=CHUNK, impl=impl),
        )
        for impl in ("fast", "reference")
    )
    same(fast, exact)


@NORMALISE
def test_recurrent_equals_chunked(normalise: bool) -> None:
    q, k, v = tensors(2, 4, 2, 19)
    start = some_state(2, 2)
    whole, end = linear_attention(q, k, v, causal=True, normalise=normalise, state=start, chunk=4)
    state, rows = start, []
    for i in range(q.shape[2]):
        row, state = linear_step(q[:, :, i], k[:, :, i], v[:, :, i], state, normalise=normalise)
        rows.append(row)
    same([torch.stack(rows, 2), *state], [whole, *end])


@NORMALISE
def test_segments_with_a_carried_state_equal_one_pass(normalise: bool) -> None:
    q, k, v = tensors(1, 2, 2, 37)
    whole, end = linear_attention(q, k, v, causal=True, normalise=normalise, chunk=CHUNK)
    state, outs = None, []
    for a, b in ((0, 1), (1, 12), (12, 12), (12, 37)):
        out, state = linear_attention(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=True, normalise=normalise, state=state, chunk=CHUNK
        )
        outs.append(out)
    assert state is not None
    same([torch.cat(outs, 2), *state], [whole, *end])


@CAUSAL
@pytest.mark.parametrize("left", [False, True])
def test_padding_counts_for_nothing(causal: bool, left: bool) -> None:
    q, k, v = tensors(2, 2, 2, 21)
    valid = torch.ones(2, 21, dtype=torch.bool)
    valid[0, slice(0, 6) if left else slice(15, 21)] = False
    bad = [torch.where(valid[:, None, :, None], x, torch.nan) for x in (q, k, v)]
    got, state = linear_attention(*bad, causal=causal, valid=valid, chunk=CHUNK)
    for b in range(2):
        kept = valid[b].nonzero()[:, 0]
        alone, own = linear_attention(*(x[b : b + 1, :, kept] for x in (q, k, v)), causal=causal, impl="reference")
        torch.testing.assert_close(got[b : b + 1, :, kept], alone)
        torch.testing.assert_close(state.kv[b : b + 1], own.kv)
        assert bool((got[b, :, ~valid[b]] == 0).all())


@CAUSAL
def test_the_future_changes_nothing_when_causal(causal: bool) -> None:
    q, k, v = tensors(1, 2, 2, 40)
    out, _ = linear_attention(q, k, v, causal=causal, chunk=CHUNK)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 21:], v2[:, :, 21:] = 3.0, -2.0
    other, _ = linear_attention(q, k2, v2, causal=causal, chunk=CHUNK)
    assert torch.equal(out[:, :, :21], other[:, :, :21]) == causal


@CAUSAL
def test_gradcheck_with_state(causal: bool) -> None:
    inputs = [*tensors(1, 2, 1, 5), *some_state(1, 1)]
    for x in inputs:
        x.requires_grad_()
    torch.autograd.gradcheck(
        lambda q, k, v, kv, z: linear_attention(q, k, v, causal=causal, state=LinearState(kv, z), chunk=2)[0], inputs
    )


@CAUSAL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_keeps_sums_in_float32(causal: bool, dtype: torch.dtype) -> None:
    q, k, v = tensors(1, 2, 1, 300, dtype=dtype)
    got, state = linear_attention(q, k, v, causal=causal)
    exact, _ = linear_attention(q.double(), k.double(), v.double(), causal=causal, impl="reference")
    assert got.dtype == dtype and state.kv.dtype == torch.float32
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 8 * torch.finfo(dtype).eps
    assert float((got.double() - exact).abs().max()) <= rounding * float(exact.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = linear_attention(q, k, v, causal=causal)
    assert torch.equal(inside, got), "autocast does not reach the sums"


@CAUSAL
def test_rows_without_weight_give_zeros_and_gradients_without_nan(causal: bool) -> None:
    q, k, v = (x.requires_grad_() for x in tensors(1, 1, 1, 9))
    out, _ = linear_attention(q * 0, k, v, causal=causal)
    assert bool((out == 0).all())
    grads = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in grads)


@CAUSAL
def test_non_contiguous_inputs(causal: bool) -> None:
    q, k, v = tensors(2, 2, 2, 33)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    same(
        [linear_attention(*strided, causal=causal, chunk=CHUNK)[0]],
        [linear_attention(q, k, v, causal=causal, chunk=CHUNK)[0]],
    )


def test_cross_attention_lengths() -> None:
    q, _, _ = tensors(1, 2, 2, 4)
    _, k, v = tensors(1, 2, 2, 9)
    got, _ = linear_attention(q, k, v)
    torch.testing.assert_close(got, by_loop(q, k, v, False, True, None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.rand(1, 2, 9, 4)}, ShapeError, "q has 5 features and k has 4"),
        ({"q": torch.rand(1, 3, 9, F)}, ShapeError, "q has 3 heads and k has 2"),
        ({"v": torch.rand(1, 2, 8, DV)}, ShapeError, "expected k and v to agree"),
        ({"q": torch.rand(1, 2, 8, F), "causal": True}, ShapeError, "Nq = Nk"),
        ({"v": torch.rand(1, 2, 9, DV).double()}, ShapeError, "one floating dtype"),
        ({"impl": "fats"}, ConfigError, "Did you mean 'fast'"),
        ({"chunk": 0}, ConfigError, "chunk is 0"),
        ({"valid": torch.ones(1, 8, dtype=torch.bool)}, ShapeError, "valid has shape"),
        ({"state": some_state(2, 2)}, ShapeError, "a state belongs to"),
    ],
)
def test_bad_calls_are_told(change: dict[str, object], error: type[Exception], message: str) -> None:
    q, k, v = tensors(1, 2, 2, 9, dtype=torch.float32)
    with pytest.raises(error, match=message):
        linear_attention(**{"q": q, "k": k, "v": v, **change})  # type: ignore[arg-type]


# --- packed sets ------------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=7)


def packed(sizes: list[int], groups: int = 1, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in tensors(1, 2 * groups, 2, sum(sizes), seed))
    return [q, k, v], torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])


@given(
    sizes=SIZES,
    groups=st.integers(1, 2),
    causal=st.booleans(),
    normalise=st.booleans(),
    with_state=st.booleans(),
    chunk=st.sampled_from([None, 1, 4, 64]),
)
def test_packed_equals_the_loop_over_sets(
    sizes: list[int], groups: int, causal: bool, normalise: bool, with_state: bool, chunk: int | None
) -> None:
    inputs, cu = packed(sizes, groups)
    inputs = inputs + (list(some_state(len(sizes), 2)) if with_state else [])
    fast, exact = (
        outcome(
            inputs,
            lambda q, k, v, s, impl=impl: linear_attention_packed(
                q, k, v, cu, causal=causal, normalise=normalise, state=s, chunk=chunk, impl=impl
            ),
        )
        for impl in ("fast", "reference")
    )
    same(fast, exact)


@CAUSAL
def test_packed_blocks_change_nothing(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, cu = packed([5, 0, 30, 1, 17])
    whole = outcome(inputs, lambda q, k, v, s: linear_attention_packed(q, k, v, cu, causal=causal, chunk=4))
    monkeypatch.setattr("foveal.kernels.linear_ragged.BLOCK", 1)
    same(outcome(inputs, lambda q, k, v, s: linear_attention_packed(q, k, v, cu, causal=causal, chunk=4)), whole)


@CAUSAL
def test_packed_sets_never_mix(causal: bool) -> None:
    (q, k, v), cu = packed([7, 12, 3])
    q, k, v = q.float(), k.float(), v.float()
    out, _ = linear_attention_packed(q, k, v, cu, causal=causal, chunk=4)
    bad = v.clone()
    bad[7:19] = torch.nan
    other, _ = linear_attention_packed(q, k, bad, cu, causal=causal, chunk=4)
    assert torch.equal(other[:7], out[:7]) and torch.equal(other[19:], out[19:])


def test_packed_equals_padded() -> None:
    sizes = [4, 9, 1]
    (q, k, v), cu = packed(sizes)
    out, state = linear_attention_packed(q, k, v, cu, causal=True)
    valid = torch.arange(9) < torch.tensor(sizes)[:, None]
    pads = []
    for x in (q, k, v):
        pad = x.new_zeros(3, 9, *x.shape[1:])
        pad[valid] = x
        pads.append(pad.transpose(1, 2))
    other, ends = linear_attention(*pads, causal=True, valid=valid)
    same([out, *state], [other.transpose(1, 2)[valid], *ends])


def test_chunks_of_packed_sets_waste_less_than_a_chunk_each() -> None:
    sizes = [1, 0, 16, 17, 40]
    _, cu = packed(sizes)
    plan = Pieces.cut(cu, 16)
    assert len(plan.owner) == 1 + 0 + 1 + 2 + 3 and int(plan.filled.sum()) == sum(sizes)
    assert Pieces.cut(torch.tensor([0, 16, 48]), 16).whole
    even = Pieces.cut(torch.arange(0, 211, 21))
    assert even.whole and even.rows.shape == (10, 21), "sets of one size waste nothing"


@pytest.mark.parametrize("cu", [[0, 5, 4, 9], [1, 9], [0, 8], [0.0, 9.0]])
def test_bad_boundaries_are_told(cu: list[float]) -> None:
    (q, k, v), _ = packed([9])
    with pytest.raises(ShapeError, match="cu_seqlens"):
        linear_attention_packed(q, k, v, torch.tensor(cu))


def test_state_is_never_written_into() -> None:
    q, k, v = tensors(1, 2, 2, 20)
    state = some_state(1, 2)
    before = copy.deepcopy(state)
    linear_attention(q, k, v, causal=True, state=state, chunk=4)
    linear_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], state)
    assert torch.equal(state.kv, before.kv) and torch.equal(state.k, before.k)
