"""Flux Attention's layer router (arXiv 2604.07394) as a function of its weights: full or sparse attention for a whole layer?

With u the mean over query heads and over the first p and the last p tokens of the queries before rotation (and after a q-norm):
``e = W2·SiLU(W1·u)``, ``ℓ = V3·SiLU(V2·SiLU(V1·e))``, and ``softmax(ℓ)[1]`` is the probability of full attention. All of it in
float32, whatever the model's dtype. The parameters live in ``foveal.layers.layer_router``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ..core.errors import ConfigError, ShapeError
from ..core.weights import check_digest, read_tensors

FORMAT = "foveal.layer_routers"
STAGES = ("W1", "W2", "V1", "V2", "V3")
"""Linear layers of one router; SiLU after all but W2 and V3."""


@dataclass(frozen=True, eq=False)
class Routers:
    """The routers of a model, loaded.

    Attributes:
        tensors: parameters by ``"<layer>.<stage>.weight"`` and ``".bias"``. layers, head_dim, pool: sizes; ``pool`` is p.
        model: digest of the weights that they were trained for (``foveal.hf.fingerprint``), "" when unknown.
        architecture: class name of that model, or "".
        metadata: what else the file says; "sparse" and "full" are the patterns that they were trained with, as JSON.
    """

    tensors: Mapping[str, Tensor]
    layers: int
    head_dim: int
    pool: int
    model: str = ""
    architecture: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def logits(self, layer: int, pooled: Tensor) -> Tensor:
        """``(B, 2)`` logits of sparse (0) and full (1) attention of one layer."""
        if not 0 <= layer < self.layers:
            raise ConfigError(
                f"the routers were made for {self.layers} layers, and layer {layer} asks for one; expected 0 to {self.layers - 1}."
            )
        return router_logits(pooled, {n: self.tensors[f"{layer}.{n}"] for n in parameter_names()})


def parameter_names() -> list[str]:
    """Names of one router's parameters."""
    return [f"{stage}.{kind}" for stage in STAGES for kind in ("weight", "bias")]


def router_logits(pooled: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """``(B, 2)`` float32 logits from pooled queries ``(B, d)``."""
    width = tensors["W1.weight"].shape[1]
    if pooled.dim() != 2 or pooled.shape[1] != width:
        raise ShapeError(
            f"the pooled queries have shape {tuple(pooled.shape)}; this router was made for (batch, head_dim={width})."
        )
    x = pooled.to(tensors["W1.weight"].dtype)
    for stage in STAGES:
        x = linear(x, tensors[f"{stage}.weight"], tensors[f"{stage}.bias"])
        if stage not in ("W2", "V3"):
            x = silu(x)
    return x


def pooled_queries(q: Tensor, pool: int, spans: Tensor) -> Tensor:
    """``(B, d)`` float32 mean over heads, and over the first and the last ``pool`` tokens of each row's span.

    A span shorter than ``pool`` is pooled as it is; tokens in both ends (a span shorter than ``2·pool``) count twice.

    Args:
        q: ``(B, H, N, d)`` queries before rotation. pool: p.
        spans: ``(B, 2)`` int64, the prompt's first token in each row and one after its last.

    Raises:
        ShapeError: an empty span, or one outside the tokens.
    """
    length = q.shape[2]
    first, stop = spans[:, 0], spans[:, 1]
    if bool((first < 0).any() | (stop > length).any() | (stop <= first).any()):
        raise ShapeError(
            f"prompts span {spans.tolist()} in {length} tokens; expected first < stop ≤ {length} in every row: a prompt has at least one token."
        )
    at = torch.arange(length, device=q.device)[None]
    inside = (at >= first[:, None]) & (at < stop[:, None])
    weight = (inside & (at < first[:, None] + pool)).float() + (inside & (at >= stop[:, None] - pool)).float()
    heads = q.float().mean(1)
    return torch.einsum("bn,bnd->bd", weight / weight.sum(1, keepdim=True), heads)


def load_routers(path: str, sha256: str, device: torch.device | str = "cpu") -> Routers:
    """Read routers and check the file's digest; the result is cached by file and digest.

    Raises:
        ConfigError: the file is missing, holds no routers, or has another digest.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"router {path!r} is no file; expected the safetensors file that `foveal train flux` wrote, or a policy beside it."
        )
    return _load(str(file.resolve()), sha256, str(device))


@lru_cache(maxsize=8)
def _load(path: str, sha256: str, device: str) -> Routers:
    check_digest(path, sha256, "router", "router_sha256")
    routers = read_routers(path)
    tensors = {n: t.to(device, torch.float32) for n, t in routers.tensors.items()}
    return replace(routers, tensors=tensors)


def read_routers(path: str | Path) -> Routers:
    """The routers in a file; raises :class:`ConfigError` when it holds none."""
    tensors, meta = read_tensors(path, "router")
    said = json.loads(meta.get("routers", "{}"))
    kind = (said.pop("format", None), said.pop("version", None))
    if kind != (FORMAT, 1):
        raise ConfigError(
            f"{path} has the format {kind[0]!r} version {kind[1]!r}; expected {FORMAT!r} version 1, written by LayerRouters.save."
        )
    wanted = {f"{layer}.{name}" for layer in range(said["layers"]) for name in parameter_names()}
    if set(tensors) != wanted:
        raise ConfigError(f"router {path} lacks or has too many tensors for {said['layers']} layers; train it again.")
    return Routers(tensors, **said)
