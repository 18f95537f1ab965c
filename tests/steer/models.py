"""Tiny random vision-language models of the families that visual interventions promise to serve, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

IMAGE, VOCAB = 60, 61
PLAIN = {"do_sample": False, "suppress_tokens": [2, 57, 58, 59, IMAGE]}
"""Settings of ``generate``: greedy, to the full length, and without image tokens, which a random model may choose."""

_TEXT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4, "intermediate_size": 48,
}  # fmt: skip


def _llava() -> Any:
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION), text_config=hf.LlamaConfig(**_TEXT), image_token_id=IMAGE
    )
    return hf.LlavaForConditionalGeneration(config)


def _qwen(model: Any, config: Any, vision: dict[str, Any]) -> Any:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "temporal_patch_size": 2, **vision}
    ids = {"video_token_id": 59, "vision_start_token_id": 58, "vision_end_token_id": 57}
    return model(
        config(text_config={**_TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, **ids)
    )


def _idefics(model: Any, config: Any) -> Any:
    return model(
        config(text_config=hf.LlamaConfig(**_TEXT), vision_config=_VISION, image_token_id=IMAGE, scale_factor=2)
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "qwen2-vl": lambda: _qwen(hf.Qwen2VLForConditionalGeneration, hf.Qwen2VLConfig, {"embed_dim": 32, "mlp_ratio": 2}),
    "qwen2.5-vl": lambda: _qwen(
        hf.Qwen2_5_VLForConditionalGeneration, hf.Qwen2_5_VLConfig,
        {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "idefics3": lambda: _idefics(hf.Idefics3ForConditionalGeneration, hf.Idefics3Config),
    "smolvlm": lambda: _idefics(hf.SmolVLMForConditionalGeneration, hf.SmolVLMConfig),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = FAMILIES[name]().to(dtype).eval()
    text = model.get_submodule("model.text_model" if hasattr(model.model, "text_model") else "model.language_model")
    with torch.no_grad():
        for path, p in text.named_parameters():
            if p.dim() == 2:
                p.mul_(6.0 if "q_proj" in path or "k_proj" in path else 4.0 if "embed" not in path else 20.0)
    return model


def prompt(
    name: str, seed: int = 0, before: int = 2, after: int = 5, dtype: torch.dtype = torch.float64
) -> dict[str, Any]:
    """One request: text, image, text."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 50, (1, before + after), generator=g)
    count = {"llava": 16}.get(name, 4)
    image = torch.full((1, count), IMAGE)
    if name.startswith("qwen"):
        image = torch.cat([torch.tensor([[58]]), image, torch.tensor([[57]])], 1)
    ids = torch.cat([words[:, :before], image, words[:, before:]], 1)
    if name == "llava":
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=g).to(dtype)}
    if name.startswith("qwen"):
        pixels = torch.randn(16, 96, generator=g).to(dtype)
        grid = torch.tensor([[1, 4, 4]])
        return {
            "input_ids": ids,
            "pixel_values": pixels,
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
    return {"input_ids": ids, "pixel_values": torch.randn(1, 1, 3, 16, 16, generator=g).to(dtype)}


def left_padded(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Requests of a family with Llama's positions as one left-padded batch."""
    longest = max(r["input_ids"].shape[1] for r in requests)
    rows = [torch.nn.functional.pad(r["input_ids"][0], (longest - r["input_ids"].shape[1], 0)) for r in requests]
    masks = [torch.arange(longest) >= longest - r["input_ids"].shape[1] for r in requests]
    mask = torch.stack(masks).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    pixels = torch.cat([r["pixel_values"] for r in requests])
    return {"input_ids": torch.stack(rows), "attention_mask": mask, "position_ids": positions, "pixel_values": pixels}
