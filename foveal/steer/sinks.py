"""Sink tokens by their signature: massive activations in a few dimensions of the residual stream (arXiv 2503.03321)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, UnsupportedError
from ..hf import families

SINK_DIMS = {
    "llava-1.5-7b": (1415, 2533), "llama-2-7b": (1415, 2533), "llava-1.5-13b": (2100, 4743), "llama-2-13b": (2100, 4743),
    "qwen2-vl-7b": (458, 2570), "internvl2-8b": (3584,),
}  # fmt: skip
"""Sink dimensions that the paper lists; a property of the base language model."""

TauMode = Literal["paper", "energy"]
ENERGY = 0.098
"""The paper's threshold as the share of a vector's energy that one dimension holds."""


def sink_values(x: Tensor, dims: Sequence[int]) -> Tensor:
    """φ(x) = max over the dims of |x[d]| / RMS(x), without learned gain: ``(..., D)`` → ``(...)`` in float32 at least.

    Never above √D; a vector of zeros gives 0.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = x.square().mean(-1).sqrt()
    top = x[..., list(dims)].abs().amax(-1)
    return torch.where(rms > 0, top / torch.where(rms > 0, rms, 1.0), 0.0)


def threshold(tau: float, mode: TauMode, dim: int) -> float:
    """The limit on φ: ``tau`` itself, or √(tau · D) where ``tau`` is the share of a vector's energy that one dimension must hold.

    Warns when no vector of this width can reach it.
    """
    if mode not in ("paper", "energy"):
        raise ConfigError(
            f"tau_mode is {mode!r}; expected 'paper' (absolute) or 'energy' (share of the vector's energy)."
        )
    limit = tau if mode == "paper" else math.sqrt(tau * dim)
    if limit > math.sqrt(dim):
        warnings.warn(
            f"foveal: the sink threshold {limit:g} is above √D = {math.sqrt(dim):.3g}, so no token can be a sink; "
            f"use tau_mode='energy' with tau={ENERGY}, the paper's threshold as a share.",
            stacklevel=3,
        )
    return limit


def blocks(model: nn.Module) -> dict[int, nn.Module]:
    """The decoder block around each self-attention layer, by layer index; what enters it is the residual stream."""
    modules = dict(model.named_modules())
    found = {
        s.index: modules[s.name.rsplit(".", 1)[0]] for s in families.sites(model) if s.index >= 0 and "." in s.name
    }
    if not found:
        raise UnsupportedError(
            f"{type(model).__name__} has no blocks around its attention, so its residual stream cannot be read."
        )
    return found


@contextmanager
def on_inputs(stack: Mapping[int, nn.Module], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``see(layer, hidden states)`` whenever one of the blocks begins."""

    def reader(layer: int) -> Any:
        return lambda module, args, kwargs: see(layer, args[0] if args else kwargs["hidden_states"])

    hooks = [block.register_forward_pre_hook(reader(layer), with_kwargs=True) for layer, block in stack.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def find_sink_dims(
    model: nn.Module, prompts: Sequence[Mapping[str, Any]], *, tau: float = 20.0, tau_mode: TauMode = "paper", most: int = 4
) -> tuple[int, ...]:  # fmt: skip
    """Sink dimensions of a model: where its first token is massive over a few prompts, in most layers from 2 to the last but one.

    Args:
        model: a transformers decoder. prompts: keyword arguments of its forward, one request each, without left padding.
        tau, tau_mode: limit on |x[d]| / RMS(x). most: dimensions kept, the largest by the median over prompts and layers.

    Returns:
        The dimensions, largest first; empty when the model has no massive dimensions: nothing is picked then.

    Raises:
        ConfigError: no prompts, or fewer than five layers.
    """
    stack = blocks(model)
    if not prompts or len(stack) < 5:
        raise ConfigError(
            f"find_sink_dims needs prompts and at least 5 layers; received {len(prompts)} and {len(stack)}."
        )
    middle = [layer for layer in sorted(stack) if 2 <= layer <= len(stack) - 2]
    seen: dict[int, list[Tensor]] = {layer: [] for layer in middle}

    def see(layer: int, hidden: Tensor) -> None:
        x = hidden[:, 0].float()
        seen[layer].append(x.abs() / x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-30))

    with on_inputs({layer: stack[layer] for layer in middle}, see):
        for prompt in prompts:
            model(**prompt)
    share = torch.stack([torch.cat(seen[layer]).median(0).values for layer in middle])  # (layers, D)
    limit = tau if tau_mode == "paper" else math.sqrt(tau * share.shape[1])
    massive = (share >= limit).float().mean(0) > 0.5
    order = share.median(0).values.masked_fill(~massive, -1).argsort(descending=True)[: min(most, int(massive.sum()))]
    return tuple(order.tolist())
