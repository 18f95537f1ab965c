"""Tiny random models whose attention is far from uniform, and their eager weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

N = 90
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 24, "attn_logit_softcapping": 3.0},
    "Mistral": {"sliding_window": 16, "head_dim": 8},
    "GptOss": {
        "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 20, "rope_scaling": None,
        "rope_parameters": None,
    },
}  # fmt: skip


def tiny(name: str = "Llama", **changes: Any) -> nn.Module:
    """A decoder of the family."""
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**TINY, **FAMILIES.get(name, {}), **changes})
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    for parameter in model.parameters():  # the default 0.02 makes every head uniform
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def tokens(batch: int = 1, length: int = N, seed: int = 1) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def eager_weights(model: nn.Module, **inputs: Any) -> Tensor:
    """``(B, L, H, N, N)`` float64."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    out = model(**inputs, output_attentions=True, use_cache=False)
    model.set_attn_implementation(before)
    return torch.stack([w.double() for w in out.attentions], 1)
