"""Re-ttention: the identities of its sheet's section 6, its schedules, modes and ramp, and a state that is explicit."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.errors import ConfigError, ShapeError
from foveal.patterns import Dense, Disc, FrameBand, MoBA, Operator, Rettention, SlidingWindow, attend
from foveal.patterns.rettention import ratio_of

from ..support import assert_close

BAND = FrameBand(0.2)
MODES = ("reshape", "ratio", "residual", "plain")


def tensors(
    seed: int = 0, batch: int = 2, length: int = 70, scale: float = 1.0, dtype: Any = torch.float64
) -> list[Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = ((batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 6))
    return [(scale * torch.randn(*s, generator=make, dtype=torch.float64)).to(dtype) for s in shapes]


def at(step: int, length: int = 70, **extra: Any) -> SelectContext:
    return SelectContext(base=BaseMask.build(length, length, causal=False), step=step, **extra)


def generate(method: Rettention, inputs: list[list[Tensor]]) -> list[Tensor]:
    """Outputs of a generation, one call per step, carrying the state."""
    outs, state = [], None
    for step, (q, k, v) in enumerate(inputs):
        out, _, state = attend(method, q, k, v, at(step, q.shape[2]), state)
        outs.append(out)
    return outs


def parts(q: Tensor, k: Tensor, v: Tensor, pattern: Any = BAND) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Dense out, weights ``A`` ``(B, H, N, N)``, mask ``(N, N)`` and repeated values, written out."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    place = torch.arange(q.shape[2])
    return weights @ v, weights, (place[:, None] - place).abs() <= pattern.half(q.shape[2]), v


# --- section 6 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_ones_is_full_attention_in_every_mode(mode: Any) -> None:
    method = Rettention(Dense(), warmup=1, period=3, mode=mode, ramp=0.0)
    inputs = [tensors(seed) for seed in range(5)]
    *_, state = attend(method, *inputs[1], at(1))
    assert_close(state.ratio, torch.ones_like(state.ratio))
    assert_close(state.residual, torch.zeros_like(state.residual))
    if mode == "residual":  # O_dense − O of the refresh is zero
        assert state.residual.abs().max() == 0
    for out, qkv in zip(generate(method, inputs), inputs, strict=True):
        assert_close(out, parts(*qkv)[0])


def test_at_the_refresh_ratio_and_residual_are_what_the_kept_and_the_dropped_keys_contribute() -> None:
    q, k, v = tensors()
    full, weights, mask, values = parts(q, k, v)
    sparse, _, _ = attend(BAND, q, k, v, at(0))
    out, _, state = attend(Rettention(BAND, warmup=0), q, k, v, at(0))
    assert_close(out, full)
    assert_close(state.ratio[..., None] * sparse + state.residual, full)
    assert_close(state.residual, weights.masked_fill(mask, 0.0) @ values)
    assert_close(
        state.ratio[..., None] * sparse, (weights * mask) @ values, what="ratio mode is the mask after the softmax"
    )
    assert_close(state.ratio, (weights * mask).sum(-1), what="rows of ρ·P_S sum to ρ")
    assert (state.ratio <= 1).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["reshape", "residual"]), st.sampled_from([1, 63, 64, 65, 129]))
def test_frozen_inputs_give_full_attention_at_every_step(seed: int, mode: Any, length: int) -> None:
    qkv = tensors(seed, length=length)
    for out in generate(Rettention(SlidingWindow(3), warmup=1, period=4, mode=mode, ramp=0.0), [qkv] * 7):
        assert_close(out, parts(*qkv)[0])


@pytest.mark.parametrize("offset", [-80.0, 0.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_ratio_from_log_sums_equals_the_ratio_of_sums(offset: float, dtype: torch.dtype) -> None:
    q, k, v = tensors(dtype=dtype)
    q[..., -1], k[..., -1] = 8**0.5, offset  # every logit moves by the offset, which a softmax does not see
    _, weights, mask, _ = parts(q.double(), k.double(), v.double())
    *_, state = attend(Rettention(BAND, warmup=0), q, k, v, at(0))
    assert state.ratio.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = (weights * mask).sum(-1)
    assert_close(
        state.ratio,
        exact.to(state.ratio.dtype),
        {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype],
    )


def test_reshaped_rows_sum_to_one_at_the_refresh() -> None:
    q, k, v = tensors()
    ones = torch.ones_like(v)
    method = Rettention(BAND, warmup=0, ramp=0.0)
    _, _, state = attend(method, q, k, ones, at(0))
    assert_close(attend(method, q, k, ones, at(1), state)[0], torch.ones(2, 4, 70, 6, dtype=q.dtype))


SCHEDULES = [(20, 5, [5, 10, 15], 12), (50, 10, list(range(10, 50, 5)), 32), (50, 15, list(range(15, 50, 5)), 28)]


@pytest.mark.parametrize(
    ("steps", "warmup", "refreshes", "sparse"), SCHEDULES, ids=["PixArt", "Hunyuan-DiT", "CogVideoX"]
)
def test_schedules_of_the_paper(steps: int, warmup: int, refreshes: list[int], sparse: int) -> None:
    method = Rettention(BAND, warmup=warmup)
    kinds = method.schedule(steps)
    assert kinds[:warmup] == ["full"] * warmup
    assert [i for i, kind in enumerate(kinds) if kind == "refresh"] == refreshes
    assert kinds.count("sparse") == sparse
    saving = {20: 60, 50: {10: 64, 15: 56}.get(warmup)}[steps]
    assert round(100 * (1 - method.run_cost(steps, 0.0))) == saving  # no run saves more, however fast a sparse step is


def test_a_second_generation_equals_the_first() -> None:
    method = Rettention(BAND, warmup=2, period=3)
    inputs = [tensors(seed) for seed in range(8)]
    first, again = generate(method, inputs), generate(method, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    *_, state = attend(method, *inputs[5], at(5))
    out, _, fresh = attend(method, *inputs[0], at(0), state)  # step 0 starts anew, whatever the state
    assert torch.equal(out, first[0]) and fresh.ratio is None


def test_the_residual_may_be_taken_after_the_output_projection() -> None:
    before, now = tensors(1), tensors(2)
    method = Rettention(BAND, warmup=0, ramp=0.0)
    projection = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    bias = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    full, _, state = attend(method, *before, at(0))
    ours = attend(method, *now, at(1), state)[0] @ projection + bias
    scaled_then = attend(BAND, *before, at(0))[0] * state.ratio[..., None]
    scaled_now = attend(BAND, *now, at(0))[0] * state.ratio[..., None]
    after = (full @ projection + bias) - (scaled_then @ projection + bias)
    assert_close(scaled_now @ projection + bias + after, ours)


@pytest.mark.parametrize("ramp", [0.04, "auto"])
def test_guidance_halves_equal_two_runs(ramp: Any) -> None:
    method = Rettention(BAND, warmup=1, period=3, ramp=ramp)
    inputs = [tensors(seed) for seed in range(9)]
    both = generate(method, inputs)
    for half in (slice(0, 1), slice(1, 2)):
        alone = generate(method, [[t[half] for t in qkv] for qkv in inputs])
        for a, b in zip(alone, both, strict=True):
            assert_close(a, b[half], 1e-12)
    *_, state = attend(method, *inputs[1], at(1))
    out = attend(method, *(t[1:] for t in inputs[2]), at(2), state.rows(slice(1, 2)))[0]
    assert_close(out, both[2][1:], 1e-12, "one half of a joint state")


# --- modes and ramp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, "post_mask"])
def test_modes_are_their_equations(mode: Any) -> None:
    then, now = tensors(1), tensors(2)
    method = Rettention(BAND, warmup=0, mode=mode, ramp=0.0)
    *_, state = attend(method, *then, at(0))
    out, lse, _ = attend(method, *now, at(1), state)
    full, weights, mask, values = parts(*then)
    ratio = (weights * mask).sum(-1, keepdim=True)
    was, sparse = attend(BAND, *then, at(0))[0], attend(BAND, *now, at(1))
    _, weights, mask, values = parts(*now)
    expected = {
        "reshape": ratio * sparse[0] + full - ratio * was,
        "ratio": ratio * sparse[0],
        "residual": sparse[0] + full - was,
        "plain": sparse[0],
        "post_mask": (weights * mask) @ values,
    }[mode]
    assert_close(out, expected)
    estimate = sparse[1] - torch.log(ratio[..., 0])
    if mode != "post_mask":
        assert_close(lse, estimate if mode in ("reshape", "ratio") else sparse[1])


@pytest.mark.parametrize("clamp", [False, True])
def test_the_ramp_is_added_after_a_sparse_step(clamp: bool) -> None:
    method = Rettention(FrameBand(1.5), warmup=0, ramp=0.04, clamp=clamp)
    *_, state = attend(method, *tensors(), at(0))
    for step, grown in ((1, 0.0), (2, 0.04), (3, 0.08), (4, 0.12)):
        expected = state.ratio + grown
        assert_close(method.ratio_at(state, step), expected.clamp(max=1.0) if clamp else expected, 1e-12)
    assert (state.ratio + 0.12 > 1).any() and (method.ratio_at(state, 4) > 1).any() == (not clamp)
    assert method.schedule(6) == ["refresh", "sparse", "sparse", "sparse", "sparse", "refresh"]


def test_an_automatic_ramp_is_the_mean_change_between_the_last_two_refreshes() -> None:
    method = Rettention(BAND, warmup=0, period=4, ramp="auto")
    *_, first = attend(method, *tensors(1), at(0))
    assert (first.drift == 0).all() and torch.equal(method.ratio_at(first, 3), first.ratio)
    *_, second = attend(method, *tensors(2, scale=1.5), at(4), first)
    assert_close(second.drift, (second.ratio - first.ratio).mean(-1) / 4)
    assert_close(method.ratio_at(second, 7), second.ratio + 2 * second.drift[..., None])


# --- state ---------------------------------------------------------------------------------------------------------


def test_a_sampler_may_call_twice_in_a_step_and_skip_steps() -> None:
    method = Rettention(BAND, warmup=0)
    *_, state = attend(method, *tensors(1), at(0))
    once, _, after = attend(method, *tensors(2), at(2), state)
    twice, _, _ = attend(method, *tensors(2), at(2), after)
    assert torch.equal(once, twice)
    assert after.ratio is state.ratio and after.residual is state.residual  # a sparse step changes nothing
    out, _, again = attend(
        method, *tensors(3), at(0), state
    )  # the second call of a refresh step is dense and keeps the cache
    assert_close(out, parts(*tensors(3))[0])
    assert again.ratio is state.ratio


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "state is of torch.float64; expected torch.float32"),
        (lambda q, k, v: (q[:1], k[:1], v[:1]), "state is of shape"),
    ],
)
def test_a_state_of_other_tensors_is_refused(change: Any, names: str) -> None:
    method = Rettention(BAND, warmup=0)
    *_, state = attend(method, *tensors(1), at(0))
    with pytest.raises(ShapeError, match=names):
        attend(method, *change(*tensors(2)), at(1), state)


def test_a_state_of_another_grid_is_refused() -> None:
    method = Rettention(Dense(), warmup=0)
    q, k, v = tensors(1)
    base = at(0).base
    *_, state = attend(method, q, k, v, SelectContext(base=base, step=0, grid=(7, 10)))
    with pytest.raises(ShapeError, match=r"state is of the grid \(7, 10\); expected \(10, 7\)"):
        attend(method, q, k, v, SelectContext(base=base, step=1, grid=(10, 7)), state)


def test_a_mask_that_changes_and_a_generation_without_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"Rettention.pattern is .*stays from step to step"):
        Rettention(MoBA(8, 2))
    with pytest.raises(ConfigError, match="steps is 0; expected at least 1"):
        Rettention(BAND).run_cost(0, 0.5)


def test_the_same_inputs_and_state_give_the_same_outputs_and_states_travel() -> None:
    method = Rettention(BAND, warmup=0, ramp="auto")
    *_, state = attend(method, *tensors(1), at(0))
    before = copy.deepcopy(state)
    out, lse, _ = attend(method, *tensors(2), at(1), state)
    again, lse_again, _ = attend(method, *tensors(2), at(1), copy.deepcopy(state).to("cpu"))
    assert torch.equal(out, again) and torch.equal(lse, lse_again)
    assert torch.equal(state.ratio, before.ratio) and torch.equal(state.residual, before.residual)


def test_a_lost_state_makes_the_step_a_refresh() -> None:
    method = Rettention(BAND, warmup=2)
    out, _, state = attend(method, *tensors(), at(7))
    assert_close(out, parts(*tensors())[0])
    assert state.refreshed == 7
    *_, warm = attend(method, *tensors(), at(1))
    assert attend(method, *tensors(), at(3), warm)[2].refreshed == 3


def test_gradients_of_a_sparse_step_treat_ratio_and_residual_as_constants() -> None:
    method = Rettention(BAND, warmup=0)
    *_, state = attend(method, *[t.requires_grad_() for t in tensors(1)], at(0))
    assert not state.ratio.requires_grad and not state.residual.requires_grad
    now = [t.requires_grad_() for t in tensors(2)]
    got = torch.autograd.grad(attend(method, *now, at(1), state)[0].square().sum(), now)
    out = state.ratio[..., None] * attend(BAND, *now, at(1))[0] + state.residual
    for a, b in zip(got, torch.autograd.grad(out.square().sum(), now), strict=True):
        assert_close(a, b)


def test_rows_that_see_nothing_have_ratio_one_and_rows_without_a_kept_key_are_pure_residual() -> None:
    none = torch.tensor([-torch.inf, -torch.inf, 0.0])
    assert ratio_of(none, torch.tensor([-torch.inf, 1.0, 0.0])).tolist() == [1.0, 0.0, 1.0]
    valid = torch.ones(2, 70, dtype=torch.bool)
    valid[1, 20:] = False
    base = BaseMask.build(70, 70, causal=False, valid=valid)
    method = Rettention(SlidingWindow(3), warmup=0)
    q, k, v = tensors()
    full, _, state = attend(method, q, k, v, SelectContext(base=base, step=0))
    assert (state.ratio[1, :, 30:] == 0).all()
    out = attend(method, *tensors(5), SelectContext(base=base, step=1), state)[0]
    assert_close(out[1, :, 30:], full[1, :, 30:])


def test_json() -> None:
    for method in (Rettention(Disc(8, (64, 64), 512), warmup=10, ramp="auto", mode="ratio"), Rettention(BAND)):
        data = method.to_json()
        assert data["pattern"]["pattern"] in ("disc", "frame_band")
        assert Operator.from_json(data) == method and hash(method) == hash(Operator.from_json(data))


METHOD = Rettention(BAND, warmup=0)


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda s: attend(METHOD, *tensors(batch=1), at(1), s), ShapeError, r"state is of shape \(2, 4, 70, 6\); expected \(1, 4, 70, 6\)"),
        (lambda s: attend(METHOD, *tensors(length=71), at(1, 71), s), ShapeError, r"state is of shape .*expected \(2, 4, 71, 6\)"),
        (lambda s: attend(METHOD, *tensors(), at(1, layer_index=3), s), ShapeError, "state is of layer 0; expected that of layer 3"),
        (lambda s: attend(METHOD, *tensors(), at(2), "cache"), ShapeError, "state is a str; expected a StepState"),
        (lambda s: attend(METHOD, *tensors(), at(2), s.at(4)), ConfigError, "state is of step 4 and ctx.step is 2; expected a step of at least 4"),
        (lambda s: attend(replace(METHOD, period=9), *tensors(), at(2), s), ConfigError, "state was made by"),
        (lambda s: attend(METHOD, *tensors(), replace(at(0), step=None)), ConfigError, "ctx.step is None; expected"),
        (lambda s: attend(METHOD, *tensors(), at(0, 71)), ShapeError, "71 queries and 71 keys; expected 70 and 70"),
        (lambda s: Rettention(BAND, warmup=-1), ConfigError, "warmup is -1"),
        (lambda s: Rettention(BAND, period=0), ConfigError, "period is 0"),
        (lambda s: Rettention(BAND, mode="both"), ConfigError, "mode is 'both'; expected one of"),
        (lambda s: Rettention(BAND, ramp=3.0), ConfigError, "ramp is 3.0; expected a number from −1 to 1"),
        (lambda s: Rettention(BAND, ramp="fast"), ConfigError, "ramp is 'fast'"),
    ],
)  # fmt: skip
def test_bad_input_names_argument_value_and_what_is_allowed(act: Any, error: type[Exception], words: str) -> None:
    *_, state = attend(METHOD, *tensors(), at(0))
    with pytest.raises(error, match=words):
        act(state)
