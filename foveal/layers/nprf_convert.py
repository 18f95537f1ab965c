"""From softmax to random features: copy a layer's weights, and say what the change costs (arXiv 2106.12566, Fig. 2)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, UnsupportedError
from .nprf import Kernel, NPRFAttention
from .random_features import Draw


@dataclass(frozen=True)
class Drop:
    """What a conversion costs.

    Attributes:
        before: the metric with exact softmax. after: with random features, one per draw. drop: mean of after − before.
    """

    before: float
    after: tuple[float, ...]

    @property
    def drop(self) -> float:
        return fmean(self.after) - self.before


def to_random_features(
    layer: NPRFAttention, num_features: int, *, kernel: Kernel = "prf", features: Draw = "orthogonal", seed: int = 0
) -> NPRFAttention:
    """A copy of ``layer`` with the same weights, another kernel and ``num_features`` new directions."""
    bias = layer.bias
    made = NPRFAttention(
        layer.out.in_features, layer.num_heads, num_features, max_distance=0, causal=layer.causal, normalised=layer.normalised,
        kernel=kernel, features=features, qkv_bias=layer.qkv.bias is not None, bias_limit=layer.bias_limit,
        precision=layer.precision, seed=seed,
    )  # fmt: skip
    made.bias = copy.deepcopy(bias)
    made.to(layer.out.weight)
    kept = {name: t for name, t in layer.state_dict().items() if name != "directions"}
    made.load_state_dict({**kept, "directions": made.directions})
    return made.train(layer.training)


def from_multihead(
    layer: nn.MultiheadAttention, num_features: int, *, causal: bool = False, kernel: Kernel = "prf", features: Draw = "orthogonal",
    seed: int = 0,
) -> NPRFAttention:  # fmt: skip
    """An :class:`NPRFAttention` with the weights of PyTorch's ``nn.MultiheadAttention``: not normalised, without relative bias.

    ``kernel="softmax"`` gives the same function as before. Called with ``x (B, N, dim)`` alone, whatever ``batch_first`` says.

    Raises:
        UnsupportedError: keys or values of another width, added bias keys, zero attention, or dropout above 0.
    """
    if layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn or layer.dropout:
        raise UnsupportedError(
            "from_multihead takes self-attention of one width, without bias_k/bias_v, add_zero_attn and dropout; this layer has some of them."
        )
    made = NPRFAttention(
        layer.embed_dim, layer.num_heads, num_features, max_distance=0, causal=causal, normalised=False, kernel=kernel,
        features=features, qkv_bias=layer.in_proj_bias is not None, seed=seed,
    )  # fmt: skip
    made.to(layer.in_proj_weight)
    with torch.no_grad():
        made.qkv.weight.copy_(layer.in_proj_weight)
        made.out.weight.copy_(layer.out_proj.weight)
        if layer.in_proj_bias is not None:
            made.qkv.bias.copy_(layer.in_proj_bias)
        made.out.bias.zero_() if layer.out_proj.bias is None else made.out.bias.copy_(layer.out_proj.bias)
    return made.train(layer.training)


def convert(
    model: nn.Module, num_features: int, *, kernel: Kernel = "prf", features: Draw = "orthogonal", seed: int = 0
) -> nn.Module:
    """A copy of ``model`` whose softmax :class:`NPRFAttention` layers run on random features, drawn per layer.

    Raises:
        ConfigError: the model has no such layer.
    """
    made = copy.deepcopy(model)
    found = [name for name, m in made.named_modules() if isinstance(m, NPRFAttention) and m.kernel == "softmax"]
    if not found:
        raise ConfigError(
            "convert found no NPRFAttention with kernel='softmax' in the model; build it with one, or use from_multihead for PyTorch's layer."
        )
    for index, name in enumerate(found):
        old = made.get_submodule(name)
        assert isinstance(old, NPRFAttention)
        new = to_random_features(old, num_features, kernel=kernel, features=features, seed=seed * len(found) + index)
        new.bias = old.bias  # shared tables stay shared
        if not name:
            return new
        made.set_submodule(name, new)
    return made


def conversion_drop(
    model: nn.Module,
    metric: Callable[[nn.Module], float],
    num_features: int,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    features: Draw = "orthogonal",
) -> Drop:
    """Measure ``metric`` of the model, and of its conversions without any training after it.

    Args:
        metric: of a model in eval mode, such as a loss on held-out data.
        seeds: one draw of all directions each.
    """
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            before = metric(model)
            after = tuple(metric(convert(model, num_features, features=features, seed=s)) for s in seeds)
    finally:
        model.train(was)
    return Drop(before, after)


def weight_error(q: Tensor, k: Tensor, approximate_q: Tensor, approximate_k: Tensor) -> float:
    """Mean over rows of ``‖A − Â‖₁`` (0 to 2), with A the softmax of ``q·k`` and Â the weights of the features.

    Args:
        q, k: ``(…, N, d)``, scaled as the softmax takes them. approximate_q, approximate_k: ``(…, N, m)`` their features.
    """
    exact = torch.softmax(q.double() @ k.double().mT, -1)
    pairs = approximate_q.double() @ approximate_k.double().mT
    return float((exact - pairs / pairs.sum(-1, keepdim=True)).abs().sum(-1).mean())
