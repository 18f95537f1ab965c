"""Context steering against eager attention with log α added to the scores, and its closed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.kernels.call import AttentionCall
from foveal.steer.context import context_steering, steered, steered_mass

from ..hf import models
from ..support import Host, assert_close, loop, tensors

N = 18
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "gpt_oss"]


def some(batch: int = 1, seed: int = 0) -> Tensor:
    user = torch.rand(batch, N, generator=torch.Generator().manual_seed(seed)) < 0.4
    user[:, 4] = True
    return user


def scaled_rows(weights: Tensor, outside: Tensor, alpha: float) -> Tensor:
    """Scale and renormalise ``(…, Nq, Nk)`` weights."""
    scaled = torch.where(outside[:, None, None], alpha * weights, weights)
    total = scaled.sum(-1, keepdim=True)
    return scaled / torch.where(total == 0, 1.0, total)


@given(st.integers(0, 10**6), st.floats(0.01, 1.0), st.sampled_from(["reference", "gather", "auto"]), st.booleans())
def test_additive_form_equals_scale_and_renormalise(seed, alpha, impl, sink):
    """Also with padding, grouped heads, rows that see no user key, and a learned sink."""
    host = Host(N, N, pads=((0, 0), (3, 2)))
    q, k, v = tensors(host, seed=seed)
    outside = ~some(2, seed)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) if sink else None
    identity = torch.eye(N, dtype=torch.float64).expand(2, 2, N, N)
    weights, _, _ = loop(q, k, identity, None, host)
    if sinks is not None:  # another key outside, without a value
        weights, _, _ = loop(q, k, identity, None, host, sink_logits=sinks)
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        weights = torch.where(weights[..., :N].sum(-1, keepdim=True) == 0, 0.0, weights)
    wide = outside if sinks is None else torch.cat([outside, torch.ones(2, 1, dtype=torch.bool)], 1)
    expected = scaled_rows(weights, wide, alpha)[..., :N] @ v.repeat_interleave(2, 1)
    got = steered(AttentionCall(q, k, v, None, host.base(), q.shape[-1] ** -0.5), outside, alpha, sinks, impl)
    seen = host.base().dense(2).any(-1)[:, None, :, None]
    assert_close(torch.where(seen, got, 0.0), torch.where(seen, expected, 0.0), 1e-9)


@given(st.integers(0, 10**6), st.floats(0.01, 1.0))
def test_steering_closed_form(seed, alpha):
    """New user mass is p / (p + α(1 − p)); ratios inside and outside stay; rows without user keys keep their weights."""
    host = Host(N, N)
    q, k, _ = tensors(host, seed=seed)
    user = some(1, seed)
    user[:, :3] = False
    identity = torch.eye(N, dtype=torch.float64).expand(1, 2, N, N)
    base = host.base()
    before, _, _ = loop(q[:1], k[:1], identity, None, Host(N, N, pads=((0, 0),)))
    after = steered(AttentionCall(q[:1], k[:1], identity, None, base, q.shape[-1] ** -0.5), ~user, alpha)
    p = (before * user[:, None, None]).sum(-1)
    assert_close((after * user[:, None, None]).sum(-1), p / (p + alpha * (1 - p)), 1e-9)
    assert steered_mass(0.3, 0.95) == pytest.approx(0.311, abs=5e-4)
    for members in (user, ~user):
        inside = before * members[:, None, None]
        old, new = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in (inside, after * members[:, None, None]))
        assert_close(new, old, 1e-9)
    assert_close(after[:, :, :3], before[:, :, :3], 1e-9)


def test_alpha_one_is_the_identity_bit_for_bit():
    model, ids = models.build("llama", "sdpa"), models.tokens(1, N)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with context_steering(model, some(), 1.0):
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_alpha_towards_zero_attends_to_the_user_alone():
    host = Host(N, N, pads=((0, 0), (0, 0)))
    q, k, v = tensors(host)
    user = some(2)
    call = AttentionCall(q, k, v, None, host.base(), q.shape[-1] ** -0.5)
    identity = torch.eye(N, dtype=torch.float64).expand(2, 2, N, N)
    weights, _, _ = loop(q, k, identity, None, host)
    mine = weights * user[:, None, None]
    rows = (mine.sum(-1) > 0)[..., None]
    expected = mine / mine.sum(-1, keepdim=True).clamp(min=1e-300) @ v.repeat_interleave(2, 1)
    assert_close(torch.where(rows, steered(call, ~user, 1e-14), 0.0), torch.where(rows, expected, 0.0), 1e-8)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("generated", ["keep", "scale"])
def test_decoding_equals_one_pass_and_families_run(name, generated):
    """Token by token behind a cache, and everything at once; the mask covers the prompt only."""
    model = models.build(name, "eager" if models.eager_only(name) else "sdpa")
    ids, prompt = models.tokens(1, N), some()[:, : N - 4]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with context_steering(model, prompt, 0.4, generated=generated):
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
    prompt = torch.ones(1, N - 4, dtype=torch.bool)
    prompt[:, [2, -1]] = False
    for generated, value in (("keep", True), ("scale", False)):
        whole = torch.cat([prompt, torch.full((1, 4), value)], 1)
        with torch.no_grad():
            with context_steering(model, prompt, 0.3, generated=generated):
                short = model(input_ids=ids).logits
            with context_steering(model, whole, 0.3):
                assert_close(short, model(input_ids=ids).logits, 1e-5)
            with context_steering(model, torch.cat([prompt, torch.full((1, 4), not value)], 1), 0.3):
                assert not torch.allclose(model(input_ids=ids).logits, short, atol=1e-2)


def test_left_padding_does_not_matter():
    model, ids, user = models.build("llama", "sdpa"), models.tokens(1, N), some()
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones(1, N, dtype=torch.long)], 1)
    wide = torch.cat([torch.zeros(1, 5, dtype=torch.bool), user], 1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        with context_steering(model, user, 0.3):
            alone = model(input_ids=ids).logits
        with context_steering(model, wide, 0.3, attention_mask=mask):
            both = model(input_ids=padded, attention_mask=mask, position_ids=positions).logits
    assert_close(both[:, 5:], alone, 1e-4)


def test_generate_works_unchanged_with_beams_and_a_batch():
    """Two prompts with masks of their own give what each gives alone."""
    model, ids, user = models.build("llama", "sdpa"), models.tokens(2, N), some(2)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False}
    with torch.no_grad():
        with context_steering(model, user, 0.2):
            both = model.generate(ids, **options)
        for b in range(2):
            with context_steering(model, user[b], 0.2):
                assert torch.equal(model.generate(ids[b : b + 1], **options)[0], both[b])
        assert not torch.equal(model.generate(ids, **options), both)


def test_only_the_layers_asked_for():
    model, ids, user = models.build("llama", "sdpa"), models.tokens(1, N), some()
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True).hidden_states
        with context_steering(model, user, 0.2, layers=[1]):
            got = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert_close(got[1], plain[1], 1e-5)
    assert not torch.allclose(got[2], plain[2], atol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((some(), 0.0), ConfigError, "alpha is 0.0"),
        ((some(), 1.5), ConfigError, "alpha is 1.5"),
        ((torch.zeros(1, N, dtype=torch.bool),), ConfigError, "no token"),
        ((some().long(),), ShapeError, "expected bool"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, error, says):
    with pytest.raises(error, match=says), context_steering(models.build("llama"), *arguments):
        pass


def test_other_bad_input():
    model = models.build("llama")
    with pytest.raises(ConfigError, match="generated is 'drop'"), context_steering(model, some(), generated="drop"):
        pass
    with (
        pytest.raises(ShapeError, match="attention_mask has shape"),
        context_steering(model, some(), attention_mask=torch.ones(1, 3)),
    ):
        pass
    with pytest.raises(ShapeError, match="3 sequences"), context_steering(model, some(3)), torch.no_grad():
        model(input_ids=models.tokens(2, N))
    with pytest.raises(UnsupportedError, match="cross-attention"), context_steering(models.build("bart"), some()):
        pass
