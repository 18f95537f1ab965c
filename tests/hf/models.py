"""Tiny random models of every family that ``foveal.attach`` promises to honour, and of some that it refuses.

Weights are large enough that attention is far from uniform: a mask, scale, softcap or sink that is ignored changes the
logits by much more than any tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, WINDOW = 61, 32, 3, 4, 2, 7

_SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER = {
    **_SIZES,
    **_TOKENS,
    "intermediate_size": 48,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
}
_HYBRID = ["sliding_attention", "full_attention", "sliding_attention"]
_ENCODER = {**_SIZES, "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0}
_IMAGE = {k: v for k, v in _SIZES.items() if k != "vocab_size"} | {
    "image_size": 16,
    "patch_size": 4,
    "intermediate_size": 48,
}
_VISION_TOWER = {**_IMAGE, "num_hidden_layers": 2, "projection_dim": 16}


@dataclass(frozen=True)
class Family:
    """One row: how to build the model and what it is.

    Attributes:
        build: makes the random model's config and class.
        kind: "decoder", "encoder", "vision", "encoder-decoder" or "vision-language".
        layers: self-attention layers that foveal must count.
        cache: whether the model generates with a key-value cache.
        rolls: whether ``generate`` may keep only a window of keys for some layers.
    """

    build: Callable[[], tuple[type, Any]]
    kind: str = "decoder"
    layers: int = LAYERS
    cache: bool = True
    rolls: bool = False


def _clip() -> tuple[type, Any]:
    text = {**_ENCODER, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
    return hf.CLIPModel, hf.CLIPConfig(text_config=text, vision_config=_VISION_TOWER, projection_dim=16)


def _gemma3_vision() -> tuple[type, Any]:
    text = hf.Gemma3TextConfig(
        **_DECODER, head_dim=8, sliding_window=WINDOW, layer_types=_HYBRID, query_pre_attn_scalar=8
    )
    tower = hf.SiglipVisionConfig(**_IMAGE, vision_use_head=False)
    return hf.Gemma3ForConditionalGeneration, hf.Gemma3Config(
        text_config=text,
        vision_config=tower,
        mm_tokens_per_image=4,
        image_token_id=5,
        boi_token_index=6,
        eoi_token_index=7,
    )


def _bart() -> tuple[type, Any]:
    sizes = {
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": LAYERS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    special = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return hf.BartForConditionalGeneration, hf.BartConfig(
        vocab_size=VOCAB, max_position_embeddings=128, **sizes, **heads, **_TOKENS, **special
    )


def _whisper() -> tuple[type, Any]:
    sizes = {
        "d_model": HIDDEN,
        "encoder_layers": 2,
        "decoder_layers": LAYERS,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
    }
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    lengths = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 128}
    special = {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    return hf.WhisperForConditionalGeneration, hf.WhisperConfig(
        vocab_size=VOCAB, **sizes, **heads, **lengths, **_TOKENS, **special
    )


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**_DECODER))),
    "qwen2": Family(lambda: (hf.Qwen2ForCausalLM, hf.Qwen2Config(**_DECODER))),
    "qwen3": Family(lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(**_DECODER, head_dim=16))),
    "mistral": Family(lambda: (hf.MistralForCausalLM, hf.MistralConfig(**_DECODER, sliding_window=WINDOW)), rolls=True),
    "phi3": Family(lambda: (hf.Phi3ForCausalLM, hf.Phi3Config(**_DECODER))),
    "gemma2": Family(
        lambda: (
            hf.Gemma2ForCausalLM,
            hf.Gemma2Config(
                **_DECODER,
                head_dim=8,
                sliding_window=WINDOW,
                layer_types=_HYBRID,
                attn_logit_softcapping=1.5,
                query_pre_attn_scalar=5,
            ),
        ),
        rolls=True,
    ),
    "gemma3": Family(
        lambda: (
            hf.Gemma3ForCausalLM,
            hf.Gemma3TextConfig(
                **_DECODER, head_dim=8, sliding_window=WINDOW, layer_types=_HYBRID, query_pre_attn_scalar=8
            ),
        ),
        rolls=True,
    ),
    "gpt2": Family(
        lambda: (
            hf.GPT2LMHeadModel,
            hf.GPT2Config(
                vocab_size=VOCAB,
                n_positions=512,
                n_embd=HIDDEN,
                n_layer=LAYERS,
                n_head=HEADS,
                scale_attn_by_inverse_layer_idx=True,
                **_TOKENS,
            ),
        )
    ),
    "gpt_neox": Family(
        lambda: (
            hf.GPTNeoXForCausalLM,
            hf.GPTNeoXConfig(**{k: v for k, v in _DECODER.items() if k != "num_key_value_heads"}),
        )
    ),
    "opt": Family(
        lambda: (
            hf.OPTForCausalLM,
            hf.OPTConfig(**_SIZES, **_TOKENS, ffn_dim=48, word_embed_proj_dim=HIDDEN, max_position_embeddings=512),
        )
    ),
    "gpt_oss": Family(
        lambda: (
            hf.GptOssForCausalLM,
            hf.GptOssConfig(
                **_DECODER,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                head_dim=8,
                sliding_window=WINDOW,
                layer_types=_HYBRID,
                num_local_experts=2,
                num_experts_per_tok=1,
            ),
        ),
        rolls=True,
    ),
    "llama4": Family(
        lambda: (
            hf.Llama4ForCausalLM,
            hf.Llama4TextConfig(
                **_DECODER,
                head_dim=8,
                intermediate_size_mlp=48,
                num_local_experts=2,
                attention_chunk_size=WINDOW,
                layer_types=["chunked_attention", "full_attention", "chunked_attention"],
            ),
        ),
        rolls=True,
    ),
    "bert": Family(lambda: (hf.BertForMaskedLM, hf.BertConfig(**_ENCODER)), "encoder", cache=False),
    "albert": Family(
        lambda: (hf.AlbertForMaskedLM, hf.AlbertConfig(**_ENCODER, embedding_size=16, inner_group_num=1)),
        "encoder",
        cache=False,
    ),
    "modernbert": Family(
        lambda: (
            hf.ModernBertForMaskedLM,
            hf.ModernBertConfig(
                **_ENCODER,
                local_attention=WINDOW - 1,
                layer_types=_HYBRID,
                cls_token_id=1,
                sep_token_id=2,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        "encoder",
        cache=False,
    ),
    "vit": Family(lambda: (hf.ViTModel, hf.ViTConfig(**_IMAGE)), "vision", cache=False),
    "dinov2": Family(
        lambda: (hf.Dinov2Model, hf.Dinov2Config(**{k: v for k, v in _IMAGE.items() if k != "intermediate_size"})),
        "vision",
        cache=False,
    ),
    "clip_vision": Family(lambda: (hf.CLIPVisionModel, hf.CLIPVisionConfig(**_IMAGE)), "vision", cache=False),
    "bart": Family(_bart, "encoder-decoder", layers=5),
    "whisper": Family(_whisper, "encoder-decoder", layers=5),
    "clip": Family(_clip, "vision-language", cache=False),
    "gemma3_vision": Family(_gemma3_vision, "vision-language", rolls=True),
}

REFUSED: dict[str, Callable[[], tuple[type, Any]]] = {
    "t5": lambda: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            vocab_size=VOCAB, d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_heads=HEADS, decoder_start_token_id=0
        ),
    ),
    "mamba": lambda: (
        hf.MambaForCausalLM,
        hf.MambaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, state_size=4),
    ),
    "bloom": lambda: (
        hf.BloomForCausalLM,
        hf.BloomConfig(vocab_size=VOCAB, hidden_size=HIDDEN, n_layer=2, n_head=HEADS),
    ),
}

DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]
HYBRIDS = [name for name in DECODERS if FAMILIES[name].rolls]


def build(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A model in ``eval`` mode whose weights depend on ``name`` alone."""
    cls, config = {**{n: f.build for n, f in FAMILIES.items()}, **REFUSED}[name]()
    return fill(cls._from_config(config, attn_implementation=implementation).eval()).to(dtype)


def fill(model: Any, seed: int = 0) -> Any:
    """Fill all parameters with seeded numbers; attention logits then have a spread of about one."""
    make = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=make)
            if p.dim() >= 2 and "embed" not in name:
                p.copy_(noise * 1.3 / math.sqrt(p.shape[-1]))
            elif p.dim() >= 2:
                p.copy_(noise)
            else:
                p.copy_((p.float().mean().round() if "norm" in name.lower() or "ln" in name else 0) + 0.2 * noise)
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """``(batch, length)`` ids without special tokens."""
    return torch.randint(10, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def images(batch: int, seed: int = 0, size: int = 16) -> Tensor:
    """``(batch, 3, size, size)`` random pixels."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def inputs(name: str, batch: int = 2, length: int = 24, seed: int = 0) -> dict[str, Any]:
    """Arguments of one forward without padding."""
    kind = FAMILIES[name].kind
    if kind == "vision":
        return {"pixel_values": images(batch, seed)}
    if name == "whisper":
        sound = torch.randn(batch, 8, 24, generator=torch.Generator().manual_seed(seed))
        return {"input_features": sound, "decoder_input_ids": tokens(batch, length, seed)}
    if name == "bart":
        return {"input_ids": tokens(batch, length + 3, seed + 1), "decoder_input_ids": tokens(batch, length, seed)}
    if name == "clip":
        ids = tokens(batch, length, seed)
        ids[:, -1] = 2
        return {"input_ids": ids, "pixel_values": images(batch, seed)}
    if name == "gemma3_vision":
        ids = tokens(batch, length, seed)
        ids[:, 3], ids[:, 4:8], ids[:, 8] = 6, 5, 7
        kinds = (ids == 5).long()
        return {"input_ids": ids, "pixel_values": images(batch, seed), "token_type_ids": kinds}
    return {"input_ids": tokens(batch, length, seed)}


def eager_only(name: str) -> bool:
    """Whether transformers has no ``sdpa`` for the family (softcap, learned sinks)."""
    return name in ("gemma2", "gpt_oss")


def output(model: Any, **arguments: Any) -> Tensor:
    """The tensor that a forward is about: logits, or the last hidden state."""
    result = model(**arguments)
    if getattr(result, "logits_per_text", None) is not None:
        return torch.cat([result.text_embeds, result.image_embeds])
    return result.logits if getattr(result, "logits", None) is not None else result.last_hidden_state
