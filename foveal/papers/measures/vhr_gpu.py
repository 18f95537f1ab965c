"""VHR's claim about cost, on one GPU: a generation with reinforced heads beside a greedy one, on a model of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, LlamaConfig

from ...models.vlm import VLM, VLMConfig
from ...steer import VHR, apply
from . import gpu
from .results import write_result

VOCABULARY, IMAGE = 1024, 3
PREFILLS, DECODE = 1.5, 0.03
FAR_PREFILLS, FAR_DECODE = 3.0, 0.5
"""The direction holds up to this cost: twice the prefills, and half of the decode time for each token's hooks."""


def model_of(
    device: str, dtype: torch.dtype, *, dim: int, layers: int, heads: int, vision_dim: int, vision_layers: int, side: int, patch: int
) -> VLM:  # fmt: skip
    """A vision-language model with random weights; ``side`` and ``patch`` of the picture, in pixels."""
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        intermediate_size=11 * dim // 4, max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = Dinov2Config(
        hidden_size=vision_dim, num_hidden_layers=vision_layers, num_attention_heads=max(1, vision_dim // 64), image_size=side, patch_size=patch,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VLM(VLMConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, hidden=dim))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model.to(device, dtype).eval()  # type: ignore[arg-type]


def measure_cost(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    vision_dim: int = 384,
    vision_layers: int = 12,
    side: int = 336,
    patch: int = 14,
    words: int = 32,
    tokens: int = 128,
    repeats: int = 5,
) -> dict[str, Any]:
    """Claim ``cost``: extra wall time over greedy against one and a half prefills and 3 % of the decode time.

    Args:
        words: of the prompt, after the picture. tokens: generated.
    """
    model = model_of(
        device, dtype, dim=dim, layers=layers, heads=heads, vision_dim=vision_dim, vision_layers=vision_layers, side=side, patch=patch
    )  # fmt: skip
    make = torch.Generator().manual_seed(0)
    text = torch.randint(IMAGE + 1, VOCABULARY, (1, words), generator=make)
    picture = torch.full((1, (side // patch) ** 2), IMAGE)
    inputs = {
        "input_ids": torch.cat([torch.ones(1, 1, dtype=torch.long), picture, text], 1).to(device),
        "pixel_values": torch.randn(1, 3, side, side, generator=make).to(device, dtype),
    }

    def reinforced(alpha: float = 2.0) -> Tensor:
        with apply(model, VHR(alpha=alpha)):
            return _greedy(model, inputs, tokens)

    greedy, same = _greedy(model, inputs, tokens), reinforced(1.0)
    jobs = {
        "greedy": lambda: _greedy(model, inputs, tokens),
        "vhr": reinforced,
        "prefill": lambda: model(**inputs, use_cache=True, logits_to_keep=1),
    }
    row = gpu.timed(jobs, repeats, device, baseline="greedy")
    ms = row["ms"]
    extra, decode = ms["vhr"] - ms["greedy"], max(ms["greedy"] - ms["prefill"], 0.0)
    allowed, far = (a * ms["prefill"] + b * decode for a, b in ((PREFILLS, DECODE), (FAR_PREFILLS, FAR_DECODE)))
    numbers = {
        "ours": f"{extra:.1f} ms beyond greedy, {extra / ms['prefill']:.2f} prefills; allowed {allowed:.1f} ms",
        "criterion": {"prefills": PREFILLS, "share_of_decode_time": DECODE, "ms": round(allowed, 3)},
        "extra_ms": round(extra, 3),
        "ms": ms,
        "share_of_equal_tokens_at_alpha_1": round(float((greedy == same).double().mean()), 4),
        "prompt": inputs["input_ids"].shape[1],
        "generated": tokens,
    }
    decided = gpu.verdict(extra <= allowed, extra <= far)
    return write_result("vhr", "cost", decided, numbers, seed=0, out=out)


def _greedy(model: VLM, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """``(1, tokens)`` new tokens."""
    generator: Any = model
    return generator.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)[:, -tokens:]
