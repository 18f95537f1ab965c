"""Routers of Flux Attention (arXiv 2604.07394): one small MLP per layer says once per prompt whether the layer attends fully."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..patterns.flux_router import FORMAT, pooled_queries, read_routers, router_logits

Mode = Literal["soft", "st"]
FULL_BIAS = 4.5
"""Bias of the full class at the start: P(full) = σ(4.5) = 0.98901."""


class LayerRouter(nn.Module):
    """One layer's router: 36·d² + 17·d + 2 parameters, kept in float32.

    Args:
        head_dim: d. seed: of the initial weights: uniform with a = √5; zero biases in the head, zero weights and the bias
            ``[0, 4.5]`` in its last layer, so that every layer starts with full attention.
    """

    def __init__(self, head_dim: int, seed: int = 0) -> None:
        super().__init__()
        if head_dim < 1:
            raise ConfigError(f"LayerRouter.head_dim is {head_dim}; expected a value at least 1.")
        d = head_dim
        sizes = {"W1": (d, 8 * d), "W2": (8 * d, 2 * d), "V1": (2 * d, 4 * d), "V2": (4 * d, d), "V3": (d, 2)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, (inner, outer) in sizes.items():
                self.add_module(name, nn.Linear(inner, outer, dtype=torch.float32))
        with torch.no_grad():
            for name in ("V1", "V2", "V3"):
                self.get_parameter(f"{name}.bias").zero_()
            self.get_parameter("V3.weight").zero_()
            self.get_parameter("V3.bias")[1] = FULL_BIAS

    def forward(self, pooled: Tensor) -> Tensor:
        """``(B, 2)`` float32 logits of sparse (0) and full (1) attention from pooled queries ``(B, d)``."""
        return router_logits(pooled, dict(self.named_parameters()))


class LayerRouters(nn.Module):
    """The routers of all layers of a model.

    Args:
        layers: L. head_dim: d. pool: p, tokens pooled at either end of the prompt; stored with the weights, so that training and
            inference pool alike. seed: of the initial weights.
    """

    def __init__(self, layers: int, head_dim: int, pool: int = 100, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("layers", layers), ("pool", pool)):
            if value < 1:
                raise ConfigError(f"LayerRouters.{name} is {value}; expected a value at least 1.")
        self.pool, self.head_dim = pool, head_dim
        self.layers = nn.ModuleList(LayerRouter(head_dim, seed * 1009 + i) for i in range(layers))

    def forward(self, layer: int, q: Tensor, spans: Tensor) -> Tensor:
        """``(B, 2)`` logits of one layer from queries before rotation ``(B, H, N, d)`` and prompts' spans ``(B, 2)``."""
        return self.layers[layer](pooled_queries(q, self.pool, spans))

    def save(self, path: str | Path, *, model: str = "", architecture: str = "", **metadata: str) -> None:
        """Write a safetensors file; it appears whole or not at all, and is the same, byte for byte, for the same routers.

        Args:
            path: the file. model: digest of the weights that these routers belong to (``foveal.hf.fingerprint``).
            architecture: class name of that model. metadata: further strings to keep.
        """
        from safetensors.torch import save_file

        path = Path(path)
        said = {
            "format": FORMAT, "version": 1, "layers": len(self.layers), "head_dim": self.head_dim, "pool": self.pool, "model": model,
            "architecture": architecture, "metadata": metadata,
        }  # fmt: skip
        tensors = {n.removeprefix("layers."): p.detach().cpu().contiguous() for n, p in self.named_parameters()}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata={"routers": json.dumps(said)})
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote; raises :class:`ConfigError` when the file holds no routers."""
        found = read_routers(path)
        module = cls(found.layers, found.head_dim, found.pool)
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(found.tensors[name.removeprefix("layers.")])
        return module


def gumbel(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """``−log(−log U)`` in float64, from a CPU generator."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(min=torch.finfo(torch.float64).tiny)
    return -torch.log(-torch.log(uniform))


def gate(logits: Tensor, temperature: float, mode: Mode = "soft", noise: Tensor | None = None) -> Tensor:
    """``(B,)`` weight r of full attention in training.

    Args:
        logits: ``(B, 2)`` of sparse (0) and full (1). temperature: τ. noise: ``(B, 2)`` Gumbel noise, or None.
        mode: ``"soft"``, r = softmax((ℓ + g)/τ)[1] as in the paper's figure; ``"st"``, its arg max with the soft gradient, as in the
            authors' code.
    """
    raised = logits if noise is None else logits + noise.to(logits)
    soft = torch.softmax(raised / temperature, -1)[:, 1]
    if mode == "soft":
        return soft
    straight: Tensor = _Straight.apply(soft, (raised[:, 1] > raised[:, 0]).to(soft.dtype))
    return straight


class _Straight(torch.autograd.Function):
    """Forward the hard value exactly, backward as if it were the soft one."""

    @staticmethod
    def forward(ctx: object, soft: Tensor, hard: Tensor) -> Tensor:
        return hard

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
