"""Attention of the newest position to image tokens, step by step, from the last row alone: no N×N weights."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError
from ..hf import AttentionEvent, attach
from ..hf.vision import ImageTokens, image_tokens, require_images
from ..kernels.call import compute_dtype, relative_index
from ..patterns.dense import Dense
from .streams import Enough, kept_deltas


@dataclass(frozen=True, eq=False)
class Captured:
    """Maps of one pass.

    Attributes:
        maps: ``(T, L, Nk)`` float32, mean over heads of the attention from the position that predicts token t to every prompt token.
        ids: ``(T,)`` generated tokens; empty when nothing was generated. image: ``(Nk,)`` bool, image tokens of the prompt.
        layer_passes: layers run over a whole prompt; decode steps do not count.
    """

    maps: Tensor
    ids: Tensor
    image: Tensor
    layer_passes: int


def last_row(event: AttentionEvent) -> Tensor:
    """``(B, Nk)`` float32: attention of the last query, mean over heads, over the whole dense row."""
    call = event.call
    dtype = compute_dtype(call.q.dtype)
    q, k = call.q[:, :, -1:].to(dtype), call.k.to(dtype).repeat_interleave(call.groups, 1)
    logits = (q @ k.mT)[:, :, 0] * call.scale
    row, keys = torch.tensor(call.base.q_len - 1, device=q.device), torch.arange(k.shape[2], device=q.device)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if call.bias is not None:
        logits = logits + call.bias[:, relative_index(call, row, keys)].to(dtype)
    batch = torch.arange(q.shape[0], device=q.device)[:, None]
    seen = call.base.allowed(batch, torch.zeros_like(batch), row[None, None], keys[None])
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    if event.sink_logits is not None:
        sink = event.sink_logits.to(dtype)[None, :, None].expand(q.shape[0], -1, 1)
        return torch.softmax(torch.cat([logits, sink], -1), -1)[..., :-1].mean(1).float()
    return torch.softmax(logits, -1).mean(1).float()


@torch.no_grad()
def capture(
    model: nn.Module, inputs: Mapping[str, Any], layers: Sequence[int], *, max_new_tokens: int = 1, generate: bool = True
) -> Captured:  # fmt: skip
    """Answer greedily and record the maps of the chosen layers at every step.

    Args:
        model: a vision-language model. inputs: one request. layers: decoder layers.
        generate: False records the first step only and stops the forward after the last of the layers.

    Raises:
        ShapeError: more than one request, or no image in it. ConfigError: layers that the model lacks.
    """
    tokens: ImageTokens = image_tokens(model)
    ids = inputs["input_ids"]
    if ids.shape[0] != 1:
        raise ShapeError(f"input_ids holds {ids.shape[0]} requests; expected one at a time.")
    image = tokens.mask(ids)
    require_images(image)
    length = ids.shape[1]
    rows: list[dict[int, Tensor]] = []
    passes = 0

    def probe(event: AttentionEvent) -> None:
        nonlocal passes
        if event.layer_index < 0:
            return
        if event.layer_index == 0:
            rows.append({})
        passes += event.call.q.shape[2] > 1
        if event.layer_index in wanted:
            rows[-1][event.layer_index] = last_row(event)[0, :length].cpu()
        if not generate and event.layer_index == max(wanted):
            raise Enough

    wanted = set(layers)
    made = torch.empty(0, dtype=torch.long)
    with attach(model, Dense(), probes=[probe]) as handle, kept_deltas(model):
        wrong = [layer for layer in layers if not 0 <= layer < handle.num_layers]
        if wrong or not layers:
            raise ConfigError(f"layers is {list(layers)}; expected some of 0 to {handle.num_layers - 1}.")
        if generate:
            out: Any = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[operator]
            made = out[0, length:].cpu()
        else:
            with contextlib.suppress(Enough):
                model(**inputs)
    maps = torch.stack([torch.stack([step[layer] for layer in sorted(wanted)]) for step in rows])
    return Captured(maps, made, image[0].cpu(), passes)
