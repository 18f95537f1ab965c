"""Routed attention in transformers' models: grouped heads, generation, caches that are cropped or reordered, foreign routers."""

from __future__ import annotations

import pytest
import torch

import foveal
from foveal.core.errors import ConfigError, UnsupportedError
from foveal.hf.fingerprint import fingerprint
from foveal.hf.growing import growing_cache
from foveal.hf.queries import query_output, unrotated
from foveal.layers.layer_router import LayerRouters
from foveal.patterns import Dense, Flux, SlidingWindow
from foveal.policies import Policy, Rule

from .models import LAYERS, build, tokens

WINDOW = SlidingWindow(5, 2)


def routed(model, folder, *, bias=0.0, scale=60.0, seed=1, **fields):
    """A policy whose random routers were made for ``model``."""
    config = model.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    routers, g = LayerRouters(LAYERS, dim, pool=3), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in routers.layers:
            layer.get_parameter("V3.bias")[1] = bias
            layer.get_parameter("V3.weight").copy_(scale * torch.randn(2, dim, generator=g))
    file = folder / f"{type(model).__name__}-{bias}-{scale}.safetensors"
    routers.save(file, model=fingerprint(model), architecture=type(model).__name__)
    return Policy.uniform(Flux.of_file(file, **{"sparse": WINDOW, **fields}))


def logits(model, ids, **given):
    with torch.no_grad():
        return model(input_ids=ids, **given).logits


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral"])
def test_rows_with_different_decisions_equal_each_row_alone(family, tmp_path):
    model = build(family)
    ids = tokens(6, 20)
    with foveal.attach(model, routed(model, tmp_path)) as handle:
        out = logits(model, ids)
        made = handle.decisions()
        assert made.full.shape == (LAYERS, 6)
        for i in range(6):
            alone = logits(model, ids[i : i + 1])
            assert torch.equal(handle.decisions().full[:, 0], made.full[:, i])
            assert torch.allclose(alone[0], out[i], atol=1e-5)
    assert made.full.any() or family != "llama"
    for i in range(6):
        rules = tuple((j, Rule(Dense() if f else WINDOW)) for j, f in enumerate(made.full[:, i].tolist()))
        with foveal.attach(model, Policy(layers=rules)):
            assert torch.allclose(logits(model, ids[i : i + 1])[0], out[i], atol=1e-5)


def test_the_routers_read_queries_before_rotation(tmp_path):
    """The hook's queries are the projection's; with a q-norm the norm's."""
    for family in ("llama", "qwen3", "gemma3"):
        model = build(family)
        seen = []
        with foveal.attach(model, routed(model, tmp_path), probes=[seen.append]):
            logits(model, tokens(1, 9))
        layer = model.get_submodule(seen[0].layer_name)
        hidden = seen[0].ctx.hidden_states
        heads, dim = seen[0].call.q.shape[1], seen[0].call.q.shape[3]
        q = layer.q_proj(hidden).view(1, 9, heads, dim)
        q = (layer.q_norm(q) if hasattr(layer, "q_norm") else q).transpose(1, 2)
        assert torch.allclose(seen[0].ctx.pre_rope_q, q, atol=1e-6)
        assert not torch.allclose(seen[0].call.q, q, atol=1e-3), "rotation changes them"


def test_all_full_equals_the_dense_policy(tmp_path):
    model = build("llama")
    ids = tokens(2, 20)
    with foveal.attach(model, Dense()):
        dense = logits(model, ids)
    with foveal.attach(model, routed(model, tmp_path, bias=9.0, scale=0.0)):
        assert torch.equal(logits(model, ids), dense)
    assert torch.allclose(logits(model, ids), dense, atol=1e-5)


def test_left_padded_rows_equal_themselves_alone(tmp_path):
    model = build("llama")
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.long)
    mask[0, :7], mask[2, :3] = 0, 0
    with foveal.attach(model, routed(model, tmp_path)) as handle:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = logits(model, ids, attention_mask=mask, position_ids=positions)
        made = handle.decisions()
        for i, left in enumerate((7, 0, 3)):
            alone = logits(model, ids[i : i + 1, left:])
            assert torch.equal(handle.decisions().full[:, 0], made.full[:, i])
            assert torch.allclose(alone[0], out[i, left:], atol=1e-5)


@pytest.mark.parametrize("growing", [True, False])
def test_decoding_keeps_the_decisions_also_after_a_crop(growing, tmp_path):
    model = build("llama")
    ids = tokens(4, 26)
    with foveal.attach(model, routed(model, tmp_path)) as handle:
        cache = growing_cache(model) if growing else None
        with torch.no_grad():
            out = model(input_ids=ids[:, :15], use_cache=True, past_key_values=cache)
            made, cache = handle.decisions(), out.past_key_values
            steps = [out.logits]
            for at in range(15, 26):
                steps.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
                assert torch.equal(handle.decisions().full, made.full)
            cache.crop(20 - cache.get_seq_length())
            again = [model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(20, 26)]  # fmt: skip
            assert torch.equal(handle.decisions().full, made.full)
        assert torch.allclose(torch.cat(again, 1), torch.cat(steps[6:], 1), atol=1e-6)
    got = torch.cat(steps, 1)
    for i in range(4):
        rules = tuple((j, Rule(Dense() if f else WINDOW)) for j, f in enumerate(made.full[:, i].tolist()))
        with foveal.attach(model, Policy(layers=rules)):
            assert torch.allclose(logits(model, ids[i : i + 1])[0], got[i], atol=1e-5)


def test_generate_in_a_batch_and_by_beams(tmp_path):
    model = build("llama")
    with foveal.attach(model, routed(model, tmp_path)) as handle:
        many = model.generate(tokens(3, 12), max_new_tokens=5, do_sample=False, eos_token_id=None)
        made = handle.decisions()
        for i in range(3):
            one = model.generate(tokens(3, 12)[i : i + 1], max_new_tokens=5, do_sample=False, eos_token_id=None)
            assert torch.equal(one[0], many[i])
        model.generate(tokens(1, 12), max_new_tokens=5, num_beams=3, do_sample=False)
        assert handle.decisions().full.shape == (LAYERS, 3)
        if len({tuple(r) for r in made.full.T.tolist()}) > 1:
            with pytest.raises(UnsupportedError, match="reordered"):
                model.generate(tokens(3, 12), max_new_tokens=5, num_beams=3, do_sample=False)
    assert len({tuple(r) for r in made.full.T.tolist()}) > 1


def test_a_cache_that_another_attention_filled_is_refused(tmp_path):
    model = build("llama")
    with torch.no_grad():
        cache = model(input_ids=tokens(1, 9), use_cache=True).past_key_values
    with (
        foveal.attach(model, routed(model, tmp_path)),
        pytest.raises(UnsupportedError, match="not known after 9 tokens"),
    ):
        logits(model, tokens(1, 1), past_key_values=cache)


def test_a_router_for_another_model_is_refused(tmp_path):
    model, other = build("llama"), build("llama")
    policy = routed(model, tmp_path)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.5)
    with pytest.raises(ConfigError, match="trained for weights"):
        foveal.attach(other, policy)
    assert other.config._attn_implementation == "eager", "nothing was changed"
    with foveal.attach(model, policy):
        pass


def test_models_without_a_projection_of_queries_are_refused(tmp_path):
    model = build("gpt2")
    with (
        foveal.attach(model, routed(model, tmp_path)),
        pytest.raises(UnsupportedError, match="'flux' needs pre_rope_q"),
    ):
        logits(model, tokens(1, 9))
    assert query_output(torch.nn.Linear(1, 1)) is None


def test_other_policies_install_no_hook_on_projections():
    model = build("llama")
    with foveal.attach(model, WINDOW):
        assert not model.model.layers[0].self_attn.q_proj._forward_hooks
    with torch.no_grad():
        logits(model, tokens(1, 4))


def test_queries_are_recognised_by_shape_and_length():
    g = torch.Generator().manual_seed(0)
    rotated = torch.randn(2, 4, 4, 6, generator=g)  # as many heads as tokens
    by_token = rotated.transpose(1, 2)
    for raw in (by_token, by_token.flatten(2), rotated):
        assert torch.equal(unrotated(raw, rotated), rotated)
    assert torch.equal(unrotated(3 * rotated, rotated), 3 * rotated), "one factor for all, as some rotations have"
    assert unrotated(None, rotated) is None and unrotated(rotated[..., :5], rotated) is None
    assert unrotated(torch.zeros(2, 2, 8, 6), rotated) is None
    with pytest.raises(UnsupportedError, match="change their length"):
        unrotated(torch.randn(2, 4, 4, 6, generator=g), rotated)
