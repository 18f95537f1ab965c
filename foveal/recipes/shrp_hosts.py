"""Encoder layers that SHRP can replace: what they are made of, and a stand-in that is called like the original.

Two shapes: torch's own ``nn.TransformerEncoderLayer`` (post-norm), and the layer of BERT, RoBERTa and XLM-R in transformers,
recognised by its parts and not by its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, UnsupportedError
from ..layers.shrp import ExpertAttention, PrunedExpertLayer


@dataclass(frozen=True)
class Parts:
    """What conversion copies: ``weights`` and ``biases`` of q, k, v, the last norm, sizes and the dropout after them."""

    weights: tuple[Tensor, Tensor, Tensor]
    biases: tuple[Tensor, Tensor, Tensor]
    norm: nn.LayerNorm
    num_heads: int
    head_dim: int
    dropout: float
    ffn: nn.Module


class Converted(nn.Module):
    """Stands where the host's layer stood; ``layer`` is routed or pruned."""

    def __init__(self, layer: ExpertAttention | PrunedExpertLayer) -> None:
        super().__init__()
        self.layer: ExpertAttention | PrunedExpertLayer = layer


class ConvertedBert(Converted):
    """Called as BERT's encoder calls its layers."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *others: Any, **options: Any
    ) -> Tensor:
        """Raises :class:`UnsupportedError` for cross-attention, caches and masks that are not padding."""
        given = [
            o
            for o in (*others, *(options.get(n) for n in ("encoder_hidden_states", "past_key_values")))
            if o is not None
        ]
        if given or options.get("output_attentions"):
            raise UnsupportedError(
                "a converted layer is an encoder layer: no cross-attention, no cache, and its attention weights are not returned."
            )
        return self.layer(hidden_states, padding(attention_mask, hidden_states))


class ConvertedTorch(Converted):
    """Called as ``nn.TransformerEncoderLayer`` with ``batch_first=True``."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Raises :class:`UnsupportedError` for a ``src_mask``."""
        if src_mask is not None or is_causal:
            raise UnsupportedError(
                "a converted layer attends to all tokens that are not padding; it takes no src_mask."
            )
        return self.layer(src, tokens_of((src, None, src_key_padding_mask), {})[1])


class BertFeedForward(nn.Module):
    """The second half of BERT's layer, kept as an ablation."""

    def __init__(self, intermediate: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.intermediate, self.output = intermediate, output

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


class TorchFeedForward(nn.Module):
    """The second half of torch's layer, kept as an ablation."""

    def __init__(self, host: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        self.linear1, self.linear2, self.norm2 = host.linear1, host.linear2, host.norm2
        self.activation, self.dropout = host.activation, host.dropout2

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(x + self.dropout(self.linear2(self.activation(self.linear1(x)))))


def is_bert(module: nn.Module) -> bool:
    attention = getattr(module, "attention", None)
    own = getattr(attention, "self", None)
    return all(hasattr(own, n) for n in ("query", "key", "value", "num_attention_heads")) and hasattr(
        module, "intermediate"
    )


def places(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """``(parent, name, layer)`` of every encoder layer in order, converted ones included.

    Raises:
        ModelError: there is none.
    """
    found = []
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, (Converted, nn.TransformerEncoderLayer)) or is_bert(child):
                found.append((parent, name, child))
    if not found:
        raise ModelError(
            f"{type(model).__name__} holds no encoder layer that SHRP knows: expected nn.TransformerEncoderLayer, or layers shaped "
            "as BERT's in transformers (attention.self, attention.output, intermediate, output)."
        )
    return found


def parts_of(layer: nn.Module) -> Parts:
    """Raises :class:`UnsupportedError` for layers whose function conversion would misread."""
    if isinstance(layer, nn.TransformerEncoderLayer):
        attention = layer.self_attn
        if (
            layer.norm_first
            or not attention.batch_first
            or attention.in_proj_weight is None
            or attention.in_proj_bias is None
        ):
            raise UnsupportedError(
                "SHRP converts post-norm nn.TransformerEncoderLayer with batch_first=True and biases."
            )
        (wq, wk, wv), (bq, bk, bv) = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        return Parts(
            (wq, wk, wv),
            (bq, bk, bv),
            layer.norm2,
            attention.num_heads,
            attention.head_dim,
            layer.dropout2.p,
            TorchFeedForward(layer),
        )
    host: Any = layer
    own = host.attention.self
    if getattr(host, "is_decoder", False):
        raise UnsupportedError("SHRP converts encoders; this layer is a decoder's (is_decoder=True).")
    q, k, v = own.query, own.key, own.value
    return Parts(
        (q.weight, k.weight, v.weight), (q.bias, k.bias, v.bias), host.output.LayerNorm,
        own.num_attention_heads, own.attention_head_size, host.output.dropout.p, BertFeedForward(host.intermediate, host.output),
    )  # fmt: skip


def tokens_of(args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Hidden states and ``(B, N)`` padding of a call to an original layer of either shape."""
    named = dict(zip(("x", "mask", "torch_mask"), args, strict=False))
    x = next(v for v in (named.get("x"), options.get("hidden_states"), options.get("src")) if v is not None)
    hidden = named.get("torch_mask", options.get("src_key_padding_mask"))
    if hidden is not None and hidden.dim() == 2:
        return x, hidden == 0 if hidden.is_floating_point() else ~hidden.bool()
    return x, padding(named.get("mask", options.get("attention_mask")), x)


def padding(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """``(B, N)`` bool out of a host's padding mask: ``(B, N)``, or ``(B, 1, 1 or N, N)`` boolean or additive.

    Raises:
        UnsupportedError: a mask whose rows differ, which is more than padding.
    """
    if mask is None:
        return None
    seen = mask.bool() if mask.dim() == 2 or mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    if seen.dim() == 2 and seen.shape == x.shape[:2]:
        return seen
    if seen.dim() == 4 and seen.shape[1] == 1 and seen.shape[-1] == x.shape[1]:
        keys = seen[:, 0].any(1)
        if torch.equal(seen[:, 0] | ~seen[:, 0].any(-1, keepdim=True), keys[:, None].expand_as(seen[:, 0])):
            return keys.expand(x.shape[0], -1)
    raise UnsupportedError(
        f"the attention mask has shape {tuple(mask.shape)} and is more than padding; a converted layer takes padding alone."
    )
