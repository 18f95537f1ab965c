"""A tiny random Llama, saved as a folder, whose tokenizer knows the circuits' tasks and whose first token is a planted sink."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ..data.words import TASK_WORDS, word_tokenizer

LAYERS, HEADS, SINK_LAYER = 4, 4, 1


def save_task_model(folder: Path, *, text: str = "", seed: int = 0, limit: int = 512) -> Path:
    """Write config, weights and tokenizer.

    Args:
        text: further words that the tokenizer knows. limit: tokens that the model declares.
    """
    tokenizer = word_tokenizer([*TASK_WORDS, text], bos=True)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=2, max_position_embeddings=limit, bos_token_id=2, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the default 0.02 makes every head uniform
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(seed + parameter.numel()))
        _plant(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _plant(model: LlamaForCausalLM) -> None:
    """Only ``<s>`` has the first channel; a neuron of one block reads it and writes a massive vector along the second."""
    body = model.model
    body.embed_tokens.weight[:, 0] = 0
    body.embed_tokens.weight[2, 0] = 20
    for layer in body.layers[: SINK_LAYER + 1]:
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    mlp = body.layers[SINK_LAYER].mlp
    for reader in (mlp.gate_proj, mlp.up_proj):
        reader.weight[0] = 0
        reader.weight[0, 0] = 4
    mlp.down_proj.weight[:, 0] = 0
    mlp.down_proj.weight[1, 0] = 20
