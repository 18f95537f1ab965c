"""Context steering against its closed form, against log α added to the scores of whole models, and beside other interventions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

from foveal.core.context import SelectContext
from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.hf.interventions import Moment, reweighed
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute
from foveal.patterns import Dense, SlidingWindow
from foveal.policies.policy import Policy, Rule
from foveal.steer import VHR, ContextSteering, HeadScale, Knockout, apply, report
from foveal.steer.context import _Steering, context_factors, steered_mass

from ..hf import models
from ..support import Host, assert_close, context, loop, tensors
from .models import build, prompt

N = 18
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_oss"]


def some(batch: int = 1, seed: int = 0) -> Tensor:
    user = torch.rand(batch, N, generator=torch.Generator().manual_seed(seed)) < 0.4
    user[:, 4] = True
    return user


def scaled_rows(weights: Tensor, outside: Tensor, alpha: float) -> Tensor:
    """Scale and renormalise ``(…, Nq, Nk)`` weights."""
    scaled = torch.where(outside[:, None, None], alpha * weights, weights)
    total = scaled.sum(-1, keepdim=True)
    return scaled / torch.where(total == 0, 1.0, total)


def steered(call: AttentionCall, user: Tensor, alpha: float, sinks: Tensor | None = None, impl: str = "auto") -> Tensor:
    """The dispatcher's step on one call."""
    step = _Steering(ContextSteering(user, alpha)).reweigh(Moment(call, SelectContext(base=call.base), None))
    assert step is not None
    plain, _ = compute(call.replace(return_lse=sinks is not None), impl, sinks)
    return reweighed(call, [step], sinks, impl, plain)


def added(user: Tensor, alpha: float) -> Tensor:
    """``(…, N)`` what is added to the scores: log α outside."""
    return (~user).double() * math.log(alpha)


def unit(host: Host, heads: int = 2) -> Tensor:
    """Values that make an attention's output its weights."""
    return torch.eye(host.kv_len, dtype=torch.float64).expand(host.batch, heads, -1, -1)


@given(st.integers(0, 10**6), st.floats(0.01, 0.999), st.sampled_from(["reference", "gather", "auto"]), st.booleans())
def test_additive_form_equals_scale_and_renormalise(seed, alpha, impl, sink):
    """Also with padding, grouped heads, rows that see no user key, and a learned sink, which is one more key outside."""
    host = Host(N, N, pads=((0, 0), (3, 2)))
    q, k, v = tensors(host, seed=seed)
    user = some(2, seed)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) if sink else None
    weights, _, _ = loop(q, k, unit(host), None, host, sink_logits=sinks)
    outside = ~user
    if sinks is not None:
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        weights = torch.where(weights[..., :N].sum(-1, keepdim=True) == 0, 0.0, weights)
        outside = torch.cat([outside, torch.ones(2, 1, dtype=torch.bool)], 1)
    expected = scaled_rows(weights, outside, alpha)[..., :N] @ v.repeat_interleave(2, 1)
    got = steered(AttentionCall(q, k, v, None, host.base(), q.shape[-1] ** -0.5), user, alpha, sinks, impl)
    seen = host.base().dense(2).any(-1)[:, None, :, None]
    assert_close(torch.where(seen, got, 0.0), torch.where(seen, expected, 0.0), 1e-9)


@given(st.integers(0, 10**6), st.floats(0.01, 0.999))
def test_steering_closed_form(seed, alpha):
    """New user mass is p / (p + α(1 − p)); ratios inside and outside stay; rows without user keys keep their bits."""
    host = Host(N, N)
    q, k, _ = tensors(host, seed=seed)
    user = some(1, seed)
    user[:, :3] = False
    call = AttentionCall(q, k, unit(host), None, host.base(), q.shape[-1] ** -0.5)
    before, _ = compute(call.replace(return_lse=False), "auto")
    after = steered(call, user, alpha)
    p = (before * user[:, None, None]).sum(-1)
    assert_close((after * user[:, None, None]).sum(-1), p / (p + alpha * (1 - p)), 1e-12)
    for members in (user, ~user):
        inside = before * members[:, None, None]
        old, new = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (inside, after * members[:, None, None]))
        assert_close(new, old, 1e-9)
    assert torch.equal(after[:, :, :3], before[:, :, :3])


def test_mass_of_the_paper_and_of_rows_that_lost_some():
    assert steered_mass(0.3, 0.95) == pytest.approx(0.311, abs=5e-4)
    mass = torch.tensor([[0.7, 0.35, 1.0, 0.0], [0.3, 0.15, 0.0, 1.0]], dtype=torch.float64)
    new = mass * context_factors(mass, 0.95)
    assert_close(new.sum(0), mass.sum(0), 1e-15)  # a row that a knock-out left with half its weight keeps half
    assert float(new[1, 0]) == pytest.approx(steered_mass(0.3, 0.95)) and float(new[1, 1]) == float(new[1, 0]) / 2
    assert torch.equal(new[:, 2:], mass[:, 2:])


def test_alpha_one_is_the_identity_bit_for_bit():
    model, ids = models.build("llama", "sdpa"), models.tokens(1, N)
    with torch.no_grad():
        with apply(model, Knockout(torch.zeros(1, dtype=torch.bool))):
            plain = model(input_ids=ids).logits
        with apply(model, ContextSteering(some(), 1.0)):
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_alpha_towards_zero_attends_to_the_user_alone():
    host = Host(N, N, pads=((0, 0), (0, 0)))
    q, k, v = tensors(host)
    user = some(2)
    weights, _, _ = loop(q, k, unit(host), None, host)
    mine = weights * user[:, None, None]
    rows = (mine.sum(-1) > 0)[..., None]
    expected = mine / mine.sum(-1, keepdim=True).clamp(min=1e-300) @ v.repeat_interleave(2, 1)
    got = steered(AttentionCall(q, k, v, None, host.base(), q.shape[-1] ** -0.5), user, 1e-14)
    assert_close(torch.where(rows, got, 0.0), torch.where(rows, expected, 0.0), 1e-8)


def test_gradients_equal_those_of_the_dense_form():
    host = Host(N, N, pads=((0, 0), (3, 2)))
    q, k, v = (t.requires_grad_() for t in tensors(host))
    user = some(2)
    got = steered(AttentionCall(q, k, v, None, host.base(), 0.5), user, 0.3, impl="gather")
    keys, values = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = (q @ keys.mT * 0.5).masked_fill(~torch.from_numpy(host.dense())[:, None], -1e30)
    wanted = torch.softmax(scores + added(user, 0.3)[:, None, None], -1) @ values
    seen = host.base().dense(2).any(-1)[:, None, :, None]
    for mine, theirs in zip(*(torch.autograd.grad((o * seen).sum(), (q, k, v)) for o in (got, wanted)), strict=True):
        assert_close(mine, theirs, 1e-9)


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_model_equals_log_alpha_added_to_every_layers_scores(name):
    """The model's own attention, given a dense mask with log α on the keys outside, in float64."""
    model, ids, user = models.build(name, "sdpa", torch.float64), models.tokens(2, N), some(2)
    hidden = torch.full((N, N), -1e300, dtype=torch.float64).triu(1)
    bias = hidden + added(user, 0.4)[:, None, None]
    with torch.no_grad():
        plain, wanted = model(input_ids=ids).logits, model(input_ids=ids, attention_mask=bias).logits
        with apply(model, ContextSteering(user, 0.4)) as handle:
            got = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    told = report(handle)[0]
    assert told["rows"] > 0 and told["before"] < told["after"] < 1
    assert torch.equal(after, plain), "the model is as before"
    assert_close(got, wanted, 1e-9)
    assert not torch.allclose(wanted, plain, atol=1e-2)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("generated", ["keep", "scale"])
def test_decoding_equals_one_pass_and_families_run(name, generated):
    """Token by token behind a cache, and everything at once; the mask covers the prompt only."""
    model = models.build(name, "eager" if models.eager_only(name) else "sdpa")
    ids, asked = models.tokens(1, N), some()[:, : N - 4]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with apply(model, ContextSteering(asked, 0.4, generated=generated)):
            whole = model(input_ids=ids, use_cache=False).logits
            out = model(input_ids=ids[:, :-3], use_cache=True)
            steps = [out.logits]
            for i in range(N - 3, N):
                out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                steps.append(out.logits)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, plain), "the model is as before"
    assert_close(torch.cat(steps, 1), whole, 2e-4)
    assert not torch.allclose(whole, plain, atol=1e-2)


def test_generated_keys_are_kept_or_scaled():
    """As if the prompt's mask went on with True, or with False."""
    model, ids = models.build("llama", "sdpa"), models.tokens(1, N)
    asked = torch.ones(1, N - 4, dtype=torch.bool)
    asked[:, [2, -1]] = False
    for generated, value in (("keep", True), ("scale", False)):
        whole = torch.cat([asked, torch.full((1, 4), value)], 1)
        with torch.no_grad():
            with apply(model, ContextSteering(asked, 0.3, generated=generated)):
                short = model(input_ids=ids).logits
            with apply(model, ContextSteering(whole, 0.3)):
                assert_close(short, model(input_ids=ids).logits, 1e-5)
            with apply(model, ContextSteering(torch.cat([asked, torch.full((1, 4), not value)], 1), 0.3)):
                assert not torch.allclose(model(input_ids=ids).logits, short, atol=1e-2)


def test_left_padding_does_not_matter():
    model, ids, user = models.build("llama", "sdpa"), models.tokens(1, N), some()
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones(1, N, dtype=torch.long)], 1)
    wide = torch.cat([torch.zeros(1, 5, dtype=torch.bool), user], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        with apply(model, ContextSteering(user, 0.3)):
            alone = model(input_ids=ids).logits
        with apply(model, ContextSteering(wide, 0.3)):
            both = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    assert_close(both[:, 5:], alone, 1e-4)


def test_generate_works_unchanged_with_beams_and_a_batch():
    """Two prompts with masks of their own give what each gives alone."""
    model, ids, user = models.build("llama", "sdpa"), models.tokens(2, N), some(2)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    with torch.no_grad():
        with apply(model, ContextSteering(user, 0.2)):
            both = model.generate(ids, **options)
        for b in range(2):
            with apply(model, ContextSteering(user[b], 0.2)):
                assert torch.equal(model.generate(ids[b : b + 1], **options)[0], both[b])
        assert not torch.equal(model.generate(ids, **options), both)


def test_only_the_layers_asked_for():
    model, ids, user = models.build("llama", "sdpa"), models.tokens(1, N), some()
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True).hidden_states
        with apply(model, ContextSteering(user, 0.2, layers=[1])):
            got = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert_close(got[1], plain[1], 1e-5)
    assert not torch.allclose(got[2], plain[2], atol=1e-2)


# --- beside others ---------------------------------------------------------------------------------------------------


def logits(model: Any, ids: Tensor, *steps: Any, policy: Any = None) -> Tensor:
    with torch.no_grad(), apply(model, steps, policy):
        return model(input_ids=ids).logits


def test_after_a_masking_knockout_it_steers_what_is_left_and_heads_are_scaled_afterwards():
    model, ids, user = models.build("llama", "sdpa", torch.float64), models.tokens(1, N), some()
    gone = torch.zeros(N, dtype=torch.bool).index_fill(0, torch.tensor([1, 4, 9]), True)
    steer, knock = ContextSteering(user, 0.3), Knockout(gone, renormalise=True)
    hidden = torch.full((N, N), -1e300, dtype=torch.float64).triu(1)
    bias = torch.where(gone, -1e300, hidden + added(user, 0.3))[None, None]
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=bias).logits
    got = logits(model, ids, knock, steer)
    assert_close(got, wanted, 1e-9)
    assert_close(logits(model, ids, steer, knock), got, 1e-9)  # proportional changes of a whole row commute
    halved = Knockout(gone, 0.0)
    assert not torch.allclose(logits(model, ids, halved, steer), logits(model, ids, steer, halved), atol=1e-4)
    heads = HeadScale({1: [0, 2]}, 0.0)
    assert_close(logits(model, ids, heads, steer), logits(model, ids, steer, heads), 1e-12)
    assert not torch.allclose(logits(model, ids, heads, steer), logits(model, ids, steer), atol=1e-3)


def test_it_steers_what_a_sparse_policy_left():
    host = Host(N, N)
    q, k, _ = tensors(host, seed=5)
    user = some()
    call = AttentionCall(q, k, unit(host), None, host.base(), 0.5)
    layout, _ = SlidingWindow(window=5, sinks=1).select(q, k, context(host), None)
    sparse = call.replace(layout=layout)
    assert_close(steered(sparse, user, 0.3), scaled_rows(compute(sparse, "auto")[0], ~user, 0.3), 1e-12)


def test_what_does_not_compose_is_refused():
    model, llava = models.build("llama"), build("llava")
    with pytest.raises(ConfigError, match=r"2 × ContextSteering"):
        apply(model, [ContextSteering(some(), 0.5), ContextSteering(some(1, 1), 0.5)])
    with pytest.raises(ConfigError, match="ContextSteering names positions of the prompt, and VHR also runs"):
        apply(llava, [VHR(), ContextSteering(torch.ones(3, dtype=torch.bool), 0.5)])
    by_head = Policy(default=Rule(Dense(), heads=((0, 1, Rule(SlidingWindow(window=4))),)))
    with pytest.raises(UnsupportedError, match="rules for single heads"):
        logits(model, models.tokens(1, N), ContextSteering(some(), 0.5), policy=by_head)
    request = prompt("llava")
    user = (request["input_ids"] != 60)[:, :-1]
    with torch.no_grad(), apply(llava, [ContextSteering(user, 0.5), VHR(fixed_heads={})]):
        llava(**request)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((some(), 0.0), ConfigError, "alpha is 0.0"),
        ((some(), 1.5), ConfigError, "alpha is 1.5"),
        ((some(), float("nan")), ConfigError, "alpha is nan"),
        ((some(), 0.5, "drop"), ConfigError, "generated is 'drop'"),
        ((torch.zeros(1, N, dtype=torch.bool),), ConfigError, "no token"),
        ((some().long(),), ShapeError, "expected bool"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, error, says):
    with pytest.raises(error, match=says):
        ContextSteering(*arguments)


def test_input_that_does_not_fit_the_model():
    model = models.build("llama")
    with pytest.raises(ConfigError, match="layers names 7"):
        apply(model, ContextSteering(some(), 0.5, layers=[7]))
    with pytest.raises(ShapeError, match="3 sequences"):
        logits(model, models.tokens(2, N), ContextSteering(some(3), 0.5))
