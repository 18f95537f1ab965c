"""What transformers does to a custom attention: one test per trap, in the order of the list that this project keeps."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import foveal
from foveal.core.errors import UnsupportedError
from foveal.hf import families
from foveal.patterns import Dense, SlidingWindow

from ..support import assert_close
from . import models
from .models import DECODERS, REFUSED, build, inputs, output, tokens

TOLERANCE = 5e-5


def test_an_attention_without_a_mask_function_loses_causality_and_foveals_does_not() -> None:
    def naive(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> tuple[Tensor, None]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2), None

    hf.AttentionInterface.register("test_naive", naive)
    ids = tokens(1, 12)
    other = ids.clone()
    other[0, -1] += 1
    other[0, -1] -= 2 * (other[0, -1] >= models.VOCAB).long()
    with torch.no_grad():
        leaking = build("llama")
        leaking.set_attn_implementation("test_naive")
        assert (output(leaking, input_ids=ids)[:, :-1] != output(leaking, input_ids=other)[:, :-1]).any()
        with foveal.attach(build("llama"), Dense()) as handle:
            assert torch.equal(
                output(handle.model, input_ids=ids)[:, :-1], output(handle.model, input_ids=other)[:, :-1]
            )


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_mask_made_before_the_forward_is_tensor_like_enough_for_generate(kind: str) -> None:
    model, ids = build("llama"), tokens(2, 9)
    pads = torch.ones_like(ids)
    pads[0, :4] = 0
    options = {
        "attention_mask": pads,
        "max_new_tokens": 5,
        "do_sample": False,
        "cache_implementation": kind,
        "eos_token_id": None,
    }
    expected = model.generate(ids, **options)
    with foveal.attach(model, Dense()):
        assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("name", [*DECODERS, "bart", "whisper"])
def test_the_hook_finds_the_cache_that_the_attention_function_never_sees(name: str) -> None:
    model, found = build(name), []

    def look(event: Any) -> None:
        if event.role == "self" and event.layer_index >= handle.num_layers - models.LAYERS:
            site = next(s for s in handle.sites.values() if s.index == event.layer_index)
            found.append(handle.live.surroundings[site.module].cache)

    with torch.no_grad(), foveal.attach(model, Dense(), probes=[look]) as handle:
        result = model(**inputs(name), use_cache=True)
        made = getattr(result.past_key_values, "self_attention_cache", result.past_key_values)
        assert found
        assert all(cache is made for cache in found)
        assert not handle.live.surroundings, "nothing of a forward is kept after it"


def test_hidden_states_are_not_kept_alive_from_layer_to_layer() -> None:
    held: list[int] = []
    model = build("llama")
    with (
        torch.no_grad(),
        foveal.attach(model, Dense(), probes=[lambda e: held.append(len(handle.live.surroundings))]) as handle,
    ):
        output(model, **inputs("llama"))
    assert held == [1] * models.LAYERS


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip_vision", "albert"])
def test_layers_without_layer_idx_each_follow_their_own_rule(name: str) -> None:
    model, given = build(name), inputs(name)
    assert all(getattr(m, "layer_idx", None) is None for m in model.modules() if "Attention" in type(m).__name__)
    seen: list[Any] = []
    layered = foveal.Policy(layers=tuple((i, rule(SlidingWindow(window=i + 1))) for i in range(models.LAYERS)))
    with torch.no_grad(), foveal.attach(model, layered, probes=[lambda e: seen.append((e.layer_index, e.layout))]):
        output(model, **given)
    assert [i for i, _ in seen] == list(range(models.LAYERS))
    widths = [int(layout.mask_mod(*(torch.tensor(n) for n in (0, 0, 8)), torch.arange(16)).sum()) for _, layout in seen]
    assert widths == [1, 3, 5]


def rule(pattern: Any) -> Any:
    from foveal.policies.policy import Rule

    return Rule(pattern)


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_cannot_be_honoured_are_refused_by_name(name: str) -> None:
    model = build(name)
    before = {n: c for n, c in model.config.to_dict().items() if n != "dtype"}
    with pytest.raises(
        UnsupportedError, match=rf"{type(model).__name__} is not supported: it.* Run this model without foveal"
    ):
        foveal.attach(model, Dense())
    assert {n: c for n, c in model.config.to_dict().items() if n != "dtype"} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_other_modules_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="model is a Linear; expected a transformers PreTrainedModel"):
        foveal.attach(nn.Linear(2, 2), Dense())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "vit", "bart", "whisper", "gemma3_vision"])
def test_output_attentions_is_refused_instead_of_returning_nothing(name: str) -> None:
    model = build(name)
    with foveal.attach(model, Dense()):
        with pytest.raises(UnsupportedError, match=r"output_attentions=True asks for N×N weights"):
            model(**inputs(name), output_attentions=True)
        output(model, **inputs(name))


def test_output_attentions_in_the_config_is_refused_too() -> None:
    model = build("llama")
    model.config.output_attentions = True
    with foveal.attach(model, Dense()), pytest.raises(UnsupportedError, match="output_attentions=True"):
        model(**inputs("llama"))


@pytest.mark.parametrize(
    ("name", "field"),
    [("llama", "attention_dropout"), ("bert", "attention_probs_dropout_prob"), ("gpt2", "attn_pdrop")],
)
def test_dropout_in_training_is_refused(name: str, field: str) -> None:
    cls, config = models.FAMILIES[name].build()
    setattr(config, field, 0.25)
    model = models.fill(cls._from_config(config, attn_implementation="eager"))
    with foveal.attach(model, Dense()):
        model.train()
        with pytest.raises(UnsupportedError, match=r"asks for attention dropout 0\.25; foveal has none"):
            model(**inputs(name))
        model.eval()
        output(model, **inputs(name))


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"alibi": torch.zeros(1)}, "keyword argument 'alibi' to its attention, which foveal does not know"),
        ({"head_mask": torch.ones(4)}, "'head_mask' to its attention, which foveal does not honour"),
        ({"cu_seq_lens_q": torch.tensor([0, 24])}, "keyword argument 'cu_seq_lens_q'"),
    ],
)
def test_keyword_arguments_that_foveal_does_not_know_are_refused(extra: dict[str, Any], why: str) -> None:
    model = build("llama")
    with foveal.attach(model, Dense()), pytest.raises(UnsupportedError, match=why):
        model(**inputs("llama"), **extra)


def test_a_position_bias_is_refused_at_the_attention_too() -> None:
    model = build("llama")
    with foveal.attach(model, Dense()), pytest.raises(UnsupportedError, match="'position_bias'"):
        model(**inputs("llama"), position_bias=torch.zeros(1, 4, 24, 24))


def test_a_layer_that_never_reaches_foveal_raises() -> None:
    model = build("llama")
    site = model.model.layers[1].self_attn
    site.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with (
        foveal.attach(model, Dense()),
        pytest.raises(UnsupportedError, match=r"layer 'model\.layers\.1\.self_attn' .* ran without reaching"),
    ):
        model(**inputs("llama"))


def test_switching_the_attention_while_attached_raises() -> None:
    model = build("llama")
    with foveal.attach(model, Dense()):
        model.set_attn_implementation("sdpa")
        with pytest.raises(UnsupportedError, match="ran without reaching foveal's attention"):
            model(**inputs("llama"))
    output(model, **inputs("llama"))


def test_a_modules_own_scale_is_honoured() -> None:
    cls, config = models.FAMILIES["gpt2"].build()
    for scaled, by_layer in ((True, False), (False, False), (False, True)):
        config.scale_attn_weights, config.scale_attn_by_inverse_layer_idx = scaled, by_layer
        model = models.fill(cls._from_config(config, attn_implementation="eager").eval())
        with torch.no_grad():
            expected = output(model, **inputs("gpt2"))
            with foveal.attach(model, Dense()):
                assert_close(output(model, **inputs("gpt2")), expected, TOLERANCE, f"{scaled}, {by_layer}")


def test_learned_sinks_softcap_and_scale_reach_the_probe() -> None:
    def look(name: str) -> list[Any]:
        seen: list[Any] = []
        model = build(name)
        with torch.no_grad(), foveal.attach(model, Dense(), probes=[seen.append]):
            output(model, **inputs(name))
        return seen

    sinks = look("gpt_oss")
    assert all(e.sink_logits.shape == (models.HEADS,) for e in sinks)
    softcap = look("gemma2")
    assert [e.call.softcap for e in softcap] == [1.5] * 3
    assert [round(e.call.scale, 6) for e in softcap] == [round(5**-0.5, 6)] * 3
    llama = look("llama")
    assert all(e.sink_logits is None and e.call.softcap is None for e in llama)
    assert [round(e.call.scale, 6) for e in llama] == [round(8**-0.5, 6)] * 3
    assert [e.call.k.shape[1] for e in llama] == [models.KV_HEADS] * 3, "grouped heads are not repeated"


@pytest.mark.parametrize("name", models.HYBRIDS)
def test_hybrid_models_keep_the_window_of_each_layer(name: str) -> None:
    spans: list[int] = []
    model = build(name)
    with (
        torch.no_grad(),
        foveal.attach(model, Dense(), probes=[lambda e: spans.append(int(e.call.base.dense(1)[0, -1].sum()))]),
    ):
        output(model, **inputs(name, length=27))
    short = 27 % models.WINDOW if name == "llama4" else models.WINDOW  # llama4 has chunks, which begin anew
    assert spans == [short, short if name == "mistral" else 27, short]


def test_the_registered_functions_serve_only_attached_models() -> None:
    model = build("llama")
    with foveal.attach(model, Dense()):
        pass
    stray = build("llama")
    stray.config._attn_implementation_internal = "foveal"
    with pytest.raises(UnsupportedError, match="LlamaAttention runs foveal's attention but no"):
        stray(**inputs("llama"))


def test_sites_are_found_in_the_models_own_order_and_cross_attention_is_told_apart() -> None:
    bart = families.sites(build("bart"))
    assert [s.index for s in bart if s.index >= 0] == list(range(5))
    assert [s.name for s in bart if s.index == 0] == ["model.encoder.layers.0.self_attn"]
    assert sorted(s.name for s in bart if s.index < 0) == [f"model.decoder.layers.{i}.encoder_attn" for i in range(3)]


def test_attached_modules_are_held_weakly() -> None:
    from foveal.hf.interface import stacks

    model = build("llama")
    with foveal.attach(model, Dense()):
        module = weakref.ref(model.model.layers[0].self_attn)
        assert module() in stacks
    assert module() not in stacks
