"""The same request with and without its image: two streams whose last tokens are the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ShapeError, UnsupportedError
from ..hf.vision import ImageTokens

_PER_TOKEN = ("input_ids", "attention_mask", "position_ids", "mm_token_type_ids")
_LEFT_OUT = {
    *_PER_TOKEN, "past_key_values", "use_cache", "labels", "inputs_embeds", "cache_position", "logits_to_keep", "output_hidden_states",
    "output_attentions", "return_dict", "num_items_in_batch",
}  # fmt: skip


class Enough(Exception):
    """Raised inside a forward of which no further layer is needed."""


def turns_in_3d(model: nn.Module) -> bool:
    """Whether the model numbers image tokens in three dimensions and works the positions out itself (Qwen's M-RoPE)."""
    return any(hasattr(m, "rope_deltas") for m in model.modules())


@contextmanager
def kept_deltas(model: nn.Module) -> Iterator[None]:
    """Give back the position offsets that Qwen's models keep on themselves from one call to the next."""
    kept: list[tuple[Any, Any]] = [(m, m.rope_deltas) for m in model.modules() if hasattr(m, "rope_deltas")]
    for m, _ in kept:
        m.rope_deltas = None
    try:
        yield
    finally:
        for m, value in kept:
            m.rope_deltas = value


def whole_prompt(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``(input_ids, attention_mask)`` of a request, both ``(B, N)``.

    Raises:
        UnsupportedError: no ids, or a 4-D mask. ShapeError: padding on the right, where the last position predicts nothing.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise UnsupportedError(
            "taking the image out of a prompt needs its input_ids; inputs_embeds alone do not tell what is text."
        )
    mask = torch.ones_like(ids) if mask is None else mask
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedError(
            "taking the image out of a prompt needs a 2-D attention_mask (B, N), or none; static caches bring a 4-D one, so use the default cache."
        )
    if not bool(mask[:, -1].all()):
        raise ShapeError("a prompt is padded on the right; its last position must be a token. Use padding_side='left'.")
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """``(B, N)`` positions counted over real tokens, as ``generate`` counts them."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def image_stream(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of one forward over the whole request, without a cache."""
    ids, mask = whole_prompt(inputs)
    rest = {k: v for k, v in inputs.items() if k not in _LEFT_OUT}
    out = rest | {"input_ids": ids, "attention_mask": mask}
    if inputs.get("mm_token_type_ids") is not None:
        out["mm_token_type_ids"] = inputs["mm_token_type_ids"]
    if not turns_in_3d(model):
        given = inputs.get("position_ids")
        out["position_ids"] = positions_of(mask) if given is None else given
    return out | _quietly(model)


def text_stream(model: nn.Module, inputs: Mapping[str, Any], tokens: ImageTokens, *, keep_positions: bool = False, last: int = 1) -> dict[str, Any]:  # fmt: skip
    """The same request without image tokens, wrappers and pixels, padded on the left.

    Args:
        last: final tokens that always stay. keep_positions: number the rest as if the image were there.
    """
    ids, mask = whole_prompt(inputs)
    stays = tokens.text(ids)
    stays[:, ids.shape[1] - last :] = True
    stays &= mask.bool()
    most = int(stays.sum(-1).max())
    order = torch.argsort(stays.to(torch.int8), dim=-1, stable=True)[:, ids.shape[1] - most :]  # what stays, at the end
    there = stays.gather(1, order)
    out = {"input_ids": torch.where(there, ids.gather(1, order), ids[:, -1:]), "attention_mask": there.long()}
    if inputs.get("mm_token_type_ids") is not None:
        out["mm_token_type_ids"] = torch.zeros_like(out["input_ids"])
    if turns_in_3d(model):
        if keep_positions:
            raise UnsupportedError(
                "keep_positions is not possible for a model that numbers image tokens in three dimensions."
            )
    elif keep_positions:
        out["position_ids"] = image_stream(model, inputs)["position_ids"].expand_as(ids).gather(1, order)
    else:
        out["position_ids"] = positions_of(out["attention_mask"])
    return out | _quietly(model)


def lock_step(model: nn.Module, image: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, Any]:
    """Both streams as one batch of 2 B rows, those without image last and padded on the left."""
    batch, length = image["input_ids"].shape
    pad = length - text["input_ids"].shape[1]
    out = dict(image)
    for name in ("input_ids", "attention_mask", "position_ids"):
        whole = image[name].expand(batch, -1)
        short = text[name]
        left = (
            short[:, -1:] if name == "input_ids" else torch.zeros_like(short[:, :1])
        )  # any token that is no image token
        out[name] = torch.cat([whole, torch.cat([left.expand(-1, pad), short], 1)])
    return out


def extended(inputs: Mapping[str, Any], generated: Tensor) -> dict[str, Any]:
    """A request with ``generated (B, T)`` tokens behind it, for teacher forcing."""
    ids, mask = whole_prompt(inputs)
    out = dict(inputs) | {"input_ids": torch.cat([ids, generated], 1)}
    out["attention_mask"] = torch.cat([mask, torch.ones_like(generated)], 1)
    if inputs.get("mm_token_type_ids") is not None:
        out["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(generated)], 1)
    given = inputs.get("position_ids")
    if given is not None and not (isinstance(given, Tensor) and given.dim() == 2):
        raise UnsupportedError(
            "teacher forcing works out the positions itself where they are three-dimensional; leave position_ids out."
        )
    if given is not None:
        ahead = torch.arange(1, generated.shape[1] + 1, device=ids.device)
        out["position_ids"] = torch.cat([given, given[:, -1:] + ahead], 1)
    return out


def _quietly(model: nn.Module) -> dict[str, Any]:
    """No cache, and no more logits than one."""
    named = inspect.signature(model.forward).parameters
    return {k: v for k, v in (("use_cache", False), ("logits_to_keep", 1)) if k in named}
