"""VHD, T-VHD and VHR: the identities of the spec sheet, the lock-step against the stream-by-stream definition, every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.errors import ConfigError, ShapeError, UnsupportedError
from foveal.hf.vision import image_tokens
from foveal.steer import VHR, apply, t_vhd, vhd
from foveal.steer.apply import report
from foveal.steer.streams import extended, image_stream, lock_step, text_stream
from foveal.steer.vhd import divergence, upper_half, without_outliers
from foveal.steer.vhr import default_layers
from tests.steer.models import FAMILIES, IMAGE, PLAIN, build, left_padded, prompt

LLAMA_LIKE = ["idefics3", "llava", "smolvlm"]


def head_inputs(
    model: Any, inputs: dict[str, Any], scale: dict[int, Tensor] | None = None, alpha: float = 1.0
) -> dict[int, Tensor]:
    """The inputs of every output projection ``(B, N, H, D)``, by plain hooks; ``scale`` multiplies heads there."""
    text = model.model.text_model if hasattr(model.model, "text_model") else model.model.language_model
    seen: dict[int, Tensor] = {}

    def reader(layer: int) -> Any:
        def hook(module: Any, args: Any) -> Any:
            x = args[0].unflatten(-1, (4, -1))
            seen[layer] = x
            if scale and layer in scale:
                x = x * torch.where(scale[layer], alpha, 1.0)[:, None, :, None].to(x)
            return (x.flatten(-2),)

        return hook

    hooks = [layer.self_attn.o_proj.register_forward_pre_hook(reader(i)) for i, layer in enumerate(text.layers)]
    for m in model.modules():
        if hasattr(m, "rope_deltas"):
            m.rope_deltas = None
    with torch.no_grad():
        seen[-1] = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_vhd_equals_two_plain_forwards(family: str) -> None:
    model, request = build(family), prompt(family)
    ids = request["input_ids"]
    text = ids[:, (ids[0] < 57).nonzero()[:, 0]]
    with_image = head_inputs(model, request)
    without = head_inputs(model, {"input_ids": text})
    wanted = torch.stack(
        [(with_image[i][:, -3:] - without[i][:, -3:]).norm(dim=-1).transpose(1, 2) for i in range(4)], 1
    )
    got = vhd(model, request, count=3)
    assert got.shape == (1, 4, 4, 3)
    assert torch.allclose(got, wanted, atol=1e-9)
    assert torch.allclose(vhd(model, request, metric="sq"), wanted[..., -1:] ** 2, atol=1e-9)


def test_vhd_is_zero_when_both_streams_are_the_same() -> None:
    out = torch.randn(2, 4, 8)
    assert bool((divergence(out, out) == 0).all())
    assert not bool(upper_half(divergence(out, out)).any())


@given(st.integers(0, 999), st.sampled_from([2, 4, 5, 6, 9]))
def test_half_of_the_heads_is_chosen_and_outliers_never(seed: int, heads: int) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(3, heads, generator=g)
    assert bool((upper_half(values).sum(-1) == heads // 2).all())
    text = torch.randn(3, heads, 5, generator=g)
    zeroed = without_outliers(values, text)
    assert not bool(upper_half(zeroed)[zeroed == 0].any())


def test_all_equal_divergence_chooses_none() -> None:
    assert not bool(upper_half(torch.full((2, 6), 0.4)).any())


def test_the_outlier_rule_needs_both_conditions() -> None:
    values = torch.tensor([[1.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 1.1], [1.0, 1.0, 1.0, 9.0]])
    strength = torch.tensor([[1.0, 1.0, 1.0, 9.0], [1.0, 1.0, 1.0, 9.0], [9.0, 1.0, 1.0, 1.0]])
    values[1, 0] = 1.2  # spread that leaves head 3 inside one deviation
    values[1, 1] = 0.2
    out = without_outliers(values, strength[..., None].sqrt())
    assert out[0, 3] == 0
    assert torch.equal(out[1], values[1]), "strong without the image, but not divergent"
    assert torch.equal(out[2], values[2]), "divergent, but not strong without the image"


@settings(max_examples=60)
@given(st.integers(0, 9999), st.sampled_from([1.5, 2.0, 4.0]))
def test_proposition_1_also_after_a_channel_gain(seed: int, alpha: float) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y, gain = (torch.randn(500, 16, generator=g, dtype=torch.float64) for _ in range(3))
    for c in (torch.ones_like(gain[:1]), gain[:1]):
        before = torch.cosine_similarity(c * x, c * y, dim=-1)
        after = torch.cosine_similarity(c * (x + (alpha - 1) * y), c * y, dim=-1)
        assert float((after - before).min()) > -1e-12


def test_choice_does_not_depend_on_a_monotone_metric_without_the_outlier_rule() -> None:
    g = torch.Generator().manual_seed(0)
    image, text = torch.randn(20, 6, 8, generator=g), torch.randn(20, 6, 8, generator=g)
    by = {metric: VHR(outlier=False, metric=metric).choose(image, text) for metric in ("l2", "sq")}
    assert torch.equal(by["l2"], by["sq"])


def test_default_layers_are_the_papers() -> None:
    assert default_layers(32) == (1, *range(18, 32))
    assert default_layers(4) == (1, 2, 3)


def oracle(model: Any, request: dict[str, Any], layers: list[int], alpha: float, what: VHR) -> dict[int, Tensor]:
    """The sheet's reference: for each layer both streams again, with the layers below already reinforced."""
    ids = request["input_ids"]
    mask = request.get("attention_mask", torch.ones_like(ids)).bool()
    chosen: dict[int, Tensor] = {}
    for layer in layers:
        rows = []
        for b in range(ids.shape[0]):
            own = {k: v[b : b + 1] for k, v in chosen.items()}
            whole = {k: v[b : b + 1] if k in ("input_ids", "pixel_values") else v for k, v in request.items() if k not in ("attention_mask", "position_ids")}  # fmt: skip
            whole["input_ids"] = ids[b : b + 1, mask[b]]
            if "mm_token_type_ids" in request:
                whole["pixel_values"] = request["pixel_values"]
            text = whole["input_ids"][:, whole["input_ids"][0] < 57]
            image = head_inputs(model, whole, own, alpha)[layer][:, -1]
            plain = head_inputs(model, {"input_ids": text}, own if what.reinforce_reference else None, alpha)[layer][
                :, -1
            ]
            rows.append(what.choose(image, plain))
        chosen[layer] = torch.cat(rows)
    return chosen


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("reference", [True, False])
def test_choice_and_logits_equal_the_multi_pass_oracle(family: str, reference: bool) -> None:
    model, request = build(family), prompt(family)
    what = VHR(alpha=2.5, reinforce_reference=reference)
    chosen = oracle(model, request, [1, 2, 3], 2.5, what)
    wanted = head_inputs(model, request, chosen, 2.5)[-1]
    with torch.no_grad(), apply(model, what) as handle:
        got = model(**request).logits
        told = report(handle)[0]["heads"]
    assert told == {str(k): [v[0].nonzero()[:, 0].tolist()] for k, v in chosen.items()}
    assert torch.allclose(got, wanted, atol=1e-9)
    assert sum(len(h[0]) for h in told.values()) > 0


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_lock_step_equals_stream_by_stream(family: str) -> None:
    model, request = build(family), prompt(family)
    logits = []
    with torch.no_grad():
        for together in (True, False):
            with apply(model, VHR(alpha=3.0, lock_step=together)):
                logits.append(model(**request).logits)
    assert torch.allclose(logits[0], logits[1], atol=1e-9)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_alpha_1_changes_no_bit(family: str) -> None:
    model, request = build(family), prompt(family)
    with torch.no_grad():
        plain = model(**request).logits
        with apply(model, VHR(alpha=1.0)):
            assert torch.equal(model(**request).logits, plain)
        assert torch.equal(model(**request).logits, plain)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_cached_decode_equals_full_recompute_with_the_same_heads(family: str) -> None:
    model, request = build(family), prompt(family)
    with torch.no_grad():
        with apply(model, VHR(alpha=1.5)) as handle:
            out = model.generate(**request, max_new_tokens=5, **PLAIN, output_logits=True, return_dict_in_generate=True)
            heads = handle.acts[0].now.chosen
        new = out.sequences.shape[1] - request["input_ids"].shape[1]
        whole = extended(request, out.sequences[:, -new:-1])
        whole.pop("attention_mask")
        for m in model.modules():
            if hasattr(m, "rope_deltas"):
                m.rope_deltas = None
        with apply(model, VHR(alpha=1.5, fixed_heads=heads)):
            again = model(**whole, use_cache=False).logits[:, -new:]
    assert torch.allclose(torch.stack(out.logits, 1), again.float(), rtol=1e-4, atol=1e-4)


def test_left_padding_changes_neither_vhd_nor_the_choice() -> None:
    model = build("llava")
    requests = [prompt("llava", 1, before=1, after=3), prompt("llava", 2, before=4, after=6)]
    both = left_padded(requests)
    assert torch.allclose(vhd(model, both), torch.cat([vhd(model, r) for r in requests]), atol=1e-8)
    with torch.no_grad(), apply(model, VHR(alpha=2.0)) as handle:
        together = model(**both).logits[:, -1]
        heads = report(handle)[0]["heads"]
        alone = []
        for b, r in enumerate(requests):
            alone.append(model(**r).logits[:, -1])
            assert {k: v[0] for k, v in report(handle)[0]["heads"].items()} == {k: v[b] for k, v in heads.items()}
    assert torch.allclose(together, torch.cat(alone), atol=1e-8)


@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_teacher_forced_t_vhd_equals_that_of_the_truncated_prefix(family: str) -> None:
    model, request = build(family), prompt(family)
    generated = torch.tensor([[5, 9, 12, 7]])
    whole = t_vhd(model, request, generated, k=2)
    assert whole.shape == (1, 4)
    for t in range(1, 5):
        assert torch.allclose(t_vhd(model, request, generated[:, :t], k=2), whole[:, :t], atol=1e-9)
    values = vhd(model, request)[0, :, :, 0]
    assert torch.allclose(whole[0, 0], values.sort(-1).values[:, -2:].sum(), atol=1e-9)
    assert torch.allclose(t_vhd(model, request, generated[:, :1])[0, 0], values.amax(-1).sum(), atol=1e-9)


def test_positions_can_be_kept() -> None:
    model, request = build("llava"), prompt("llava")
    tokens = image_tokens(model)
    text = text_stream(model, request, tokens, keep_positions=True)
    assert text["position_ids"].tolist() == [[0, 1, 18, 19, 20, 21, 22]]
    assert not torch.allclose(vhd(model, request, keep_positions=True), vhd(model, request))
    with torch.no_grad(), apply(model, VHR(keep_positions=True)):
        model(**request)


def test_both_streams_end_with_the_same_tokens() -> None:
    model, request = build("qwen2-vl"), prompt("qwen2-vl")
    text = text_stream(model, request, image_tokens(model))
    assert text["input_ids"].tolist() == [[i for i in request["input_ids"][0].tolist() if i < 57]]
    assert "position_ids" not in text, "the model numbers its tokens itself"
    llava = build("llava")
    both = left_padded([prompt("llava", 1, before=1, after=3), prompt("llava", 2, before=4, after=6)])
    image, text = image_stream(llava, both), text_stream(llava, both, image_tokens(llava))
    joint = lock_step(llava, image, text)
    assert joint["input_ids"].shape == (4, both["input_ids"].shape[1])
    assert bool((joint["input_ids"][2:, -3:] == joint["input_ids"][:2, -3:]).all())
    assert joint["attention_mask"][2].sum() == 4 and IMAGE not in joint["input_ids"][2]


def test_bad_input() -> None:
    text = hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    )
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM has no image tokens"):
        apply(text, VHR())
    with pytest.raises(UnsupportedError, match="has no image tokens"):
        vhd(text, {"input_ids": torch.tensor([[3]])})
    model, request = build("llava"), prompt("llava")
    with torch.no_grad():
        with apply(model, VHR()), pytest.raises(ShapeError, match="none is an image token"):
            model(input_ids=torch.tensor([[3, 4, 5]]))
        cache = model(**request, use_cache=True).past_key_values
        with apply(model, VHR()), pytest.raises(UnsupportedError, match="filled outside this block"):
            model(input_ids=torch.tensor([[4]]), past_key_values=cache)
        right = torch.ones_like(request["input_ids"])
        right[:, -1] = 0
        with apply(model, VHR()), pytest.raises(ShapeError, match="padded on the right"):
            model(**request, attention_mask=right)
        with apply(model, VHR()) as handle, pytest.raises(UnsupportedError, match="needs its input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 32).double())
        assert handle.acts[0].now.mode == ""
    with pytest.raises(ConfigError, match="alpha is -1"):
        apply(model, VHR(alpha=-1))
    with pytest.raises(ConfigError, match="metric is 'l1'"):
        vhd(model, request, metric="l1")
    with pytest.raises(ConfigError, match="hold image tokens"):
        vhd(model, request, count=9)
