"""Image sinks of a vision-language model: which tokens they are, what they contribute, and whether they lie in the background.

Analysis quantities of arXiv 2503.03321: the contribution ``‖α_ij x_j W_V W_O‖`` of key j to row i, and the share of image sinks outside object
masks. A sink draws weight but adds little: its α is large and its value short.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..hf import AttentionEvent, attach
from ..hf.vision import image_tokens, require_images
from ..kernels.call import AttentionCall, compute_dtype
from ..patterns.dense import Dense
from ..steer.sinks import TauMode, blocks, on_inputs, sink_values, threshold
from .blocks import blocks as row_blocks

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "proj", "wo")
"""Names of the output projection inside an attention module."""


@torch.no_grad()
def visual_sinks(
    model: nn.Module, inputs: Mapping[str, Any], dims: Sequence[int], *, tau: float = 20.0, tau_mode: TauMode = "paper"
) -> dict[int, Tensor]:  # fmt: skip
    """Layer → ``(B, N)`` bool: image tokens whose residual stream, as it enters the layer, is massive in one of ``dims``.

    Args:
        model: a vision-language model. inputs: what its processor makes. dims: see :func:`foveal.steer.find_sink_dims`.
        tau, tau_mode: as in :class:`foveal.steer.VAR`.

    Raises:
        UnsupportedError: no image tokens. ShapeError: a prompt without an image. ConfigError: no dims.
    """
    image = _image(model, inputs)
    if not dims:
        raise ConfigError(
            "dims is empty: without sink dimensions no token can be told to be a sink. See foveal.steer.find_sink_dims."
        )
    found: dict[int, Tensor] = {}
    limits: list[float] = []

    def see(layer: int, hidden: Tensor) -> None:
        if not limits:
            limits.append(threshold(tau, tau_mode, hidden.shape[-1]))
        found[layer] = (sink_values(hidden, dims) >= limits[0]) & image

    with on_inputs(blocks(model), see):
        model(**inputs)
    return dict(sorted(found.items()))


@torch.no_grad()
def contributions(model: nn.Module, inputs: Mapping[str, Any], rows: Tensor | None = None) -> dict[int, Tensor]:
    """Layer → ``(B, H, N)``: mean over ``rows`` of ``‖α_ij x_j W_V W_O‖`` of every key j and head, in float32 at least.

    Exact, in O(N) memory: ``α`` comes in blocks of rows, and ``‖v W‖² = v (W Wᵀ) vᵀ`` needs one small matrix per head.

    Args:
        model: a decoder, or a vision-language model. inputs: one or several requests, whole.
        rows: ``(B, N)`` bool; default the text rows, those that are neither image tokens nor padding.

    Raises:
        ShapeError: rows of another shape or dtype, or none in some request. UnsupportedError: a module without an output projection.
    """
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if rows is None:
        rows = ~_image(model, inputs) & (torch.ones_like(ids) if mask is None else mask).bool()
    if rows.shape != ids.shape or rows.dtype != torch.bool or not bool(rows.any(-1).all()):
        raise ShapeError(
            f"rows has shape {tuple(rows.shape)} and dtype {rows.dtype}; expected bool {tuple(ids.shape)} with a row in every request."
        )
    count = rows.sum(-1)
    found: dict[int, Tensor] = {}

    def probe(event: AttentionEvent) -> None:
        if event.layer_index >= 0:
            weights = _mean_weights(event, rows, count)
            found[event.layer_index] = weights * value_lengths(event.call, modules[event.layer_name])

    with attach(model, Dense(), probes=[probe]) as handle:
        modules = {site.name: site.module for site in handle.sites.values()}
        model(**{**inputs, "use_cache": False})
    return found


def _mean_weights(event: AttentionEvent, rows: Tensor, count: Tensor) -> Tensor:
    """``(B, H, N)`` mean of the chosen rows' weights."""
    call = event.call
    total = torch.zeros(*call.q.shape[:2], call.k.shape[2], dtype=compute_dtype(call.q.dtype), device=call.q.device)
    for block in row_blocks(call, event.sink_logits):
        mine = rows[block.b, block.rows].to(block.weights.dtype)[None]
        total[block.b, block.heads, block.keys] += block.columns(mine)[:, 0].to(total.dtype)
    return total / count.to(total.device)[:, None, None]


def value_lengths(call: AttentionCall, module: nn.Module) -> Tensor:
    """``(B, H, N)``: ``‖v_j W_O‖`` per query head, where ``v_j = x_j W_V`` is the call's value and W_O the head's part of the output projection."""
    heads, width = call.q.shape[1], call.v.shape[-1]
    weight = _output(module, heads * width).view(heads, width, -1).to(compute_dtype(call.v.dtype))
    gram = weight @ weight.mT
    v = call.v.to(gram.dtype).repeat_interleave(call.groups, 1)
    return torch.einsum("bhnd,hde,bhne->bhn", v, gram, v).clamp(min=0).sqrt()


def _output(module: nn.Module, width: int) -> Tensor:
    """The output projection as ``(H·Dv, D)``."""
    for name in OUTPUTS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            into = weight if type(getattr(module, name)).__name__ == "Conv1D" else weight.mT
            if into.shape[0] == width:
                return into.contiguous()
    raise UnsupportedError(
        f"{type(module).__name__} has no output projection named {', '.join(OUTPUTS)} that reads {width} numbers; "
        "its contributions cannot be measured. The probe norms gives lengths of values."
    )


@dataclass(frozen=True)
class BackgroundShare:
    """Where image sinks lie.

    Attributes:
        share: of the sinks, those outside the objects; NaN without a sink. chance: the same share of all image tokens.
        sinks: their number.
    """

    share: float
    chance: float
    sinks: int


def background_share(
    sinks: Tensor, objects: Tensor, box: tuple[float, float, float, float] | None = None
) -> BackgroundShare:
    """The share of image sinks that lie in the background: less than half of the token's part of the picture belongs to an object.

    Args:
        sinks: ``(h, w)`` bool over the token grid, see :func:`foveal.hf.picture_tokens.token_grid`.
        objects: ``(H, W)`` bool over pixels, True on objects. box: the part of the picture that the grid covers, see
            :func:`foveal.hf.picture_tokens.visible_part`; default all of it.

    Raises:
        ShapeError: masks of other shapes or dtypes.
    """
    for name, mask in (("sinks", sinks), ("objects", objects)):
        if mask.dim() != 2 or mask.dtype != torch.bool or not mask.numel():
            raise ShapeError(f"{name} has shape {tuple(mask.shape)} and dtype {mask.dtype}; expected bool (rows, columns).")  # fmt: skip
    height, width = objects.shape
    left, top, right, bottom = (0.0, 0.0, float(width), float(height)) if box is None else box
    y, x = (_edges(low, high, n) for low, high, n in ((top, bottom, sinks.shape[0]), (left, right, sinks.shape[1])))
    part = _overlap(y, height) @ objects.double() @ _overlap(x, width).mT
    area = (y[1] - y[0]) * (x[1] - x[0])
    outside = part < 0.5 * area
    count = int(sinks.sum())
    share = float(outside[sinks.to(outside.device)].double().mean()) if count else math.nan
    return BackgroundShare(share, float(outside.double().mean()), count)


def _edges(low: float, high: float, count: int) -> Tensor:
    return torch.linspace(low, high, count + 1, dtype=torch.float64)


def _overlap(edges: Tensor, length: int) -> Tensor:
    """``(cells, length)``: how much of every pixel, from i to i + 1, lies in every cell."""
    at = torch.arange(length, dtype=torch.float64)
    low, high = edges[:-1, None], edges[1:, None]
    return (torch.minimum(high, at + 1) - torch.maximum(low, at)).clamp(min=0)


def _image(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    image = image_tokens(model).mask(inputs["input_ids"])
    require_images(image)
    return image
