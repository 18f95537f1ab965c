"""Queries and keys of every attention layer of a Hugging Face causal model, as its softmax uses them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.errors import ModelError, UnsupportedError
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute

NAME = "foveal_record"


@dataclass(frozen=True, eq=False)
class Recorded:
    """One layer: q ``(B, H, N, D)`` and k ``(B, Hkv, N, D)`` after RoPE, the scale, and the model's own mask."""

    q: Tensor
    k: Tensor
    scale: float
    base: BaseMask


def record_layers(model: Any, tokens: Tensor) -> Iterator[Recorded]:
    """Run ``model`` once on ``tokens`` ``(B, N)`` without padding, without gradients, and yield its layers in order.

    Raises:
        ModelError: no attention layer went through transformers' attention interface.
        UnsupportedError: the model is no causal decoder, or adds something to its logits that this does not know.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    found: list[Recorded] = []

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, dropout: float = 0.0,
        sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if not getattr(module, "is_causal", True) or query.shape[2] != key.shape[2]:
            raise UnsupportedError(
                "the boundary predictor is trained on causal self-attention; this layer is bidirectional or cross-attention."
            )
        if kwargs.get("position_bias") is not None:
            raise UnsupportedError(
                "this model adds a position bias to its logits, which the boundary labels do not know."
            )
        base = BaseMask.build(query.shape[2], key.shape[2], causal=True, window=sliding_window, device=query.device)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        found.append(Recorded(query.detach(), key.detach(), scale, base))
        out, _ = compute(AttentionCall(query, key, value, None, base, scale, softcap, None, False), "auto", s_aux)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    training = model.training
    try:
        model.set_attn_implementation(NAME)
        model.eval()
        with torch.no_grad():
            model(input_ids=tokens.to(model.device), use_cache=False)
    finally:
        model.set_attn_implementation(before)
        model.train(training)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no attention layer that goes through transformers' attention interface, so its keys cannot be recorded."
        )
    yield from found
