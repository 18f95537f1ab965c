"""A whole model's attention, measured during one dense forward pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from .exact import Role
from .overlap import chance_overlap, overlap
from .profile import LayerProfile, numbers, profile_attention
from .stats import Estimate

if TYPE_CHECKING:
    from rich.table import Table

    from ..hf import AttentionEvent

Progress = Callable[[int, int], None]
"""Called with (layers done, self-attention layers of the model)."""


@dataclass(frozen=True, eq=False)
class ModelProfile:
    """What every attention layer of a model does on one text.

    Attributes:
        layers: in the order in which they ran.
        overlap: ``(L, L, 1 + Hkv)``, see :func:`foveal.lens.overlap`; ``[..., 0]`` is the layer as a whole.
        tokens: length of the text. rows, seed, top: the sampling that was asked for.
    """

    layers: list[LayerProfile]
    overlap: Estimate
    tokens: int
    rows: int
    seed: int
    top: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        overlaps = {name: numbers(getattr(self.overlap, name)) for name in ("mean", "low", "high")}
        chance = [numbers(torch.tensor(chance_overlap(layer))) for layer in self.layers]
        return {
            "tokens": self.tokens, "rows": self.rows, "seed": self.seed, "top": self.top,
            "layers": [layer.to_json() for layer in self.layers], "overlap": overlaps, "chance_overlap": chance,
        }  # fmt: skip

    def render(self) -> Table:
        """The profile as a table for the terminal."""
        from .show import render_profile

        return render_profile(self)


def profile_model(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any],
    *,
    rows: int = 256,
    window: int = 128,
    sinks: int = 4,
    top: int = 64,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelProfile:
    """Profile every attention layer of a transformers model in one forward pass.

    The model runs dense, through :func:`foveal.attach`, without its language-model head and without a cache; each layer is
    measured while its q and k exist, so memory beyond the forward itself is that of one layer's figures, O(N).

    Args:
        model: any model that :func:`foveal.attach` takes.
        inputs: ``(B, N)`` token ids, or the keyword arguments of the model's forward (for padding, images, decoders).
        rows, window, sinks, top, seed: as in :func:`profile_attention`.
        progress: called after each layer.

    Raises:
        UnsupportedError: the model's attention cannot be reached, or no layer ran.
        ConfigError: a setting out of range.
    """
    from ..hf import attach
    from ..patterns import Dense

    layers: list[LayerProfile] = []

    def measure(event: AttentionEvent) -> None:
        call = event.call
        role: Role = "cross" if event.role == "cross" else "self"
        layers.append(
            profile_attention(
                call.q,
                call.k,
                call.base,
                call.scale,
                call.softcap,
                call.bias,
                event.sink_logits,
                rows=rows,
                window=window,
                sinks=sinks,
                top=top,
                seed=seed,
                role=role,
                layer_index=event.layer_index,
                layer_name=event.layer_name,
                out=event.out,
            )
        )
        if progress is not None:
            progress(len(layers), event.ctx.num_layers)

    body = getattr(model, "base_model", model)
    kwargs: dict[str, Any] = dict(inputs) if isinstance(inputs, Mapping) else {"input_ids": inputs}
    if "use_cache" not in kwargs and "use_cache" in inspect.signature(body.forward).parameters:
        kwargs["use_cache"] = False
    with torch.no_grad(), attach(model, Dense(), probes=[measure]):
        body(**kwargs)
    if not layers:
        raise UnsupportedError(
            f"no attention layer of {type(model).__name__} ran; check that the inputs reach its attention."
        )
    return ModelProfile(layers, overlap(layers), max(layer.q_len for layer in layers), rows, seed, top)
