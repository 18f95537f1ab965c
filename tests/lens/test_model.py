"""Profiles of whole models against transformers' own eager attention weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveal.lens import ModelProfile, profile_model

transformers = pytest.importorskip("transformers")

N = 90
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**TINY, **changes})
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    for parameter in model.parameters():  # the default 0.02 makes every head uniform
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def tokens(batch: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, N), generator=torch.Generator().manual_seed(1))


def eager_weights(model: nn.Module, **inputs: Any) -> list[Tensor]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(**inputs, output_attentions=True, use_cache=False)
    model.set_attn_implementation(before)
    return [w.double() for w in out.attentions]


def check_masses(profile: ModelProfile, weights: list[Tensor], real: Tensor, window: int, sinks: int) -> None:
    first = real.long().argmax(-1)
    own, key = torch.arange(N)[:, None], torch.arange(N)
    is_sink = (key >= first[:, None]) & (key < first[:, None] + sinks)
    near = (own - key < window) & (own >= key)
    for layer, w in zip(profile.layers, weights, strict=True):
        on_sink = (w * is_sink[:, None, None]).sum(-1)
        on_window = (w * (near & ~is_sink[:, None])[:, None]).sum(-1)
        distance = (w * (own - key)).sum(-1) / w.sum(-1).clamp(min=1e-9)
        entropy = -torch.special.xlogy(w, w).sum(-1)
        figures = [(layer.sink_mass, on_sink), (layer.window_mass, on_window)]
        if float(layer.learned_sink_mass.sum()) == 0:
            figures += [(layer.distance.mean, distance), (layer.entropy.mean, entropy)]
        for got, row in figures:
            want = (row * real[:, None]).sum((0, 2)) / real.sum()
            torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("Llama", {}), ("Qwen2", {}), ("Gemma2", {"head_dim": 8, "sliding_window": 24, "attn_logit_softcapping": 3.0}),
     ("Mistral", {"sliding_window": 16, "head_dim": 8})],
)  # fmt: skip
def test_decoders_against_eager(name: str, changes: dict[str, Any]) -> None:
    model = tiny(name, **changes)
    profile = profile_model(model, tokens(2), rows=2 * N, window=12, sinks=2, top=8)
    assert [layer.layer_index for layer in profile.layers] == [0, 1, 2]
    check_masses(profile, eager_weights(model, input_ids=tokens(2)), torch.ones(2, N, dtype=torch.bool), 12, 2)


def test_left_padding_does_not_count() -> None:
    model = tiny("Llama")
    mask = torch.ones(2, N, dtype=torch.long)
    mask[1, :35] = 0
    inputs = {"input_ids": tokens(2), "attention_mask": mask}
    profile = profile_model(model, inputs, rows=2 * N, window=12, sinks=2, top=8)
    assert profile.layers[0].real_rows == N + 55
    check_masses(profile, eager_weights(model, **inputs), mask.bool(), 12, 2)


def test_learned_sink_logits() -> None:
    model = tiny(
        "GptOss",
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=20,
        rope_scaling=None,
        rope_parameters=None,
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.copy_(torch.tensor([-20.0, 0.0, 3.0, 40.0]))
    profile = profile_model(model, tokens(), rows=N, window=12, sinks=2, top=8)
    weights = eager_weights(model, input_ids=tokens())
    check_masses(profile, weights, torch.ones(1, N, dtype=torch.bool), 12, 2)
    for layer, w in zip(profile.layers, weights, strict=True):
        torch.testing.assert_close(layer.learned_sink_mass, 1 - w.sum(-1).mean((0, 2)), rtol=1e-4, atol=1e-5)
        assert layer.labels[3] == "dead"


def test_a_planted_sink_head_is_found() -> None:
    """GPT-2 with random weights, except that head 1 of layer 0 is wired to read the first position."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=128, n_embd=32, n_layer=2, n_head=4)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight[:, 0] = 0
        model.transformer.wpe.weight[:, 0] = 0
        model.transformer.wpe.weight[0, 0] = 30.0  # a coordinate that only the first position has
        attention = model.transformer.h[0].attn.c_attn
        query, key = slice(8, 16), slice(32 + 8, 32 + 16)
        attention.weight[:, query], attention.weight[:, key] = 0, 0
        attention.bias[query], attention.bias[key] = 0, 0
        attention.bias[8] = 10.0
        attention.weight[0, 40] = 10.0
    profile = profile_model(model, tokens(), rows=64, window=12, sinks=1)
    first = profile.layers[0]
    assert float(first.sink_mass[1]) > 0.9 and first.labels[1] in ("sink", "dead")
    assert all(float(first.sink_mass[h]) < 0.5 and first.labels[h] not in ("sink", "dead") for h in (0, 2, 3))
    assert first.top_keys[0, 1, 0] == 0


def test_bidirectional_encoder() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.BertModel(config).eval()
    profile = profile_model(model, tokens(), rows=N, window=12, sinks=2, top=8)
    key = torch.arange(N)
    near, sink = (key[:, None] - key).abs() < 12, key < 2
    for layer, w in zip(profile.layers, eager_weights(model, input_ids=tokens()), strict=True):
        torch.testing.assert_close(layer.window_mass, (w * (near & ~sink)).sum(-1).mean((0, 2)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            layer.distance.mean, (w * (key[:, None] - key).abs()).sum(-1).mean((0, 2)), rtol=1e-4, atol=1e-3
        )


def test_encoder_decoder_has_both_roles() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens()[:, :40]}
    profile = profile_model(model, inputs, rows=32, window=12, sinks=2, top=8)
    assert sorted(layer.role for layer in profile.layers) == ["cross", "cross", "self", "self", "self"]
    cross = [layer for layer in profile.layers if layer.role == "cross"]
    assert all(layer.kv_len == N and layer.q_len == 40 and float(layer.window_mass.sum()) == 0 for layer in cross)
    assert profile.to_json()["layers"][profile.layers.index(cross[0])]["distance"]["mean"] == [None] * 4


def test_the_model_is_left_as_it_was_and_progress_is_told() -> None:
    model = tiny("Llama")
    with torch.no_grad():
        before = model(tokens()).logits
    told: list[tuple[int, int]] = []
    profile_model(model, tokens(), rows=16, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, before)
