"""Sinks planted into a small random decoder, so that a detector's answer is known in advance (arXiv 2512.22213).

Position 0 gets a massive vector along a direction ``u`` after one block and loses it after another; trigger tokens get ``c·u`` after
a block of their own. What the detector must say follows from geometry: with ``h = c·u + r`` the cosine to ``u`` exceeds 0.9 exactly
while ``‖r‖ / |c|`` stays below 0.4843.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .stream import decoder_blocks, on_outputs

BOUND = 0.48432210483785254
"""tan(arccos 0.9)."""


@dataclass(frozen=True, eq=False)
class Plant:
    """Where a sink is planted.

    Attributes:
        direction: ``(D,)`` unit vector. primary, on, off: the massive vector's size, the block after which position 0 has it, and the
            block after which it is gone.
        tokens: positions that become sinks. birth: block after which they do. size: ``c`` of each.
    """

    direction: Tensor
    primary: float
    on: int
    off: int
    tokens: Sequence[int]
    birth: int
    size: Sequence[float]


@contextmanager
def planted(model: nn.Module, plant: Plant) -> Iterator[list[Tensor]]:
    """While open, the model's blocks add the plant; yields a list of the residual stream ``(B, N, D)`` after each block."""
    stream: list[Tensor] = []

    def write(layer: int, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        u = plant.direction.to(hidden.dtype)
        if layer == plant.on:
            hidden[:, 0] += plant.primary * u
        if layer == plant.off:
            hidden[:, 0] -= (hidden[:, 0] @ u)[:, None] * u
        if layer == plant.birth:
            for token, size in zip(plant.tokens, plant.size, strict=True):
                hidden[:, token] += size * u
        stream.append(hidden)
        return hidden

    with on_outputs(decoder_blocks(model), write):
        yield stream


def expected(stream: Sequence[Tensor], plant: Plant, token: int) -> tuple[int, int] | None:
    """``(birth, lifetime)`` of a token by the geometry alone, or None when it never is a sink."""
    alive = []
    for layer in range(plant.on, plant.off):
        h = stream[layer][0, token].double()
        c = float(h @ plant.direction.double())
        rest = float((h - c * plant.direction.double()).norm())
        if rest < BOUND * abs(c):
            alive.append(layer)
    return (alive[0], len(alive)) if alive else None


def small_decoder(seed: int, layers: int = 12, dim: int = 64) -> nn.Module:
    """A random Llama with blocks that matter: each writes about a third of the stream's norm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config: Any = LlamaConfig(
            vocab_size=97, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.09)
    return model
