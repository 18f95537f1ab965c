"""What gates do to a model: attention on the first key, massive activations, gate scores, sparsity (arXiv 2505.06708).

The paper describes its measures in words. Here F-Attn is the mean over batch, heads and queries of the probability on key 0, and M-Act
the mean over layers of the largest absolute value of the residual stream. F-Attn depends on the length: uniform causal attention
already gives H_N / N, so the length, the value without the first queries and the ratio to uniform attention stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError
from ..kernels.call import AttentionCall
from ..layers.gated import GatedAttention
from .exact import row_masses

BINS = 20
"""Bins of the histogram of gate scores, from 0 to 1."""


@torch.no_grad()
def first_key_mass(q: Tensor, k: Tensor, *, causal: bool = True, scale: float | None = None) -> Tensor:
    """``(B, H, Nq)`` float32 attention probability on key 0, in O(N) memory.

    Args:
        q: ``(B, H, Nq, D)``, k: ``(B, Hkv, Nk, D)``, as they enter attention. scale: default 1/√D.
    """
    base = BaseMask.build(q.shape[2], k.shape[2], causal=causal, device=q.device)
    call = AttentionCall(q, k, k, None, base, q.shape[-1] ** -0.5 if scale is None else scale)
    return row_masses(call, None, window=1, sinks=1).sink


@dataclass(frozen=True)
class FirstKey:
    """F-Attn of one layer over ``length`` keys.

    Attributes:
        share: mean over all queries. late: mean over queries from ``skip`` on. uniform, late_uniform: the same two under uniform causal
            attention; ``late / late_uniform`` above 1 is a sink.
    """

    share: float
    late: float
    uniform: float
    late_uniform: float
    length: int
    skip: int


def first_key(mass: Tensor, keep: Tensor | None = None, skip: int = 16) -> FirstKey:
    """F-Attn from :func:`first_key_mass` of causal self-attention.

    Args:
        mass: ``(B, H, N)``. keep: ``(B, N)`` bool, queries that count; default all. skip: first queries left out of ``late``.

    Raises:
        ShapeError: fewer queries than ``skip``, or keep of another shape.
    """
    batch, _, length = mass.shape
    if length <= skip or (keep is not None and tuple(keep.shape) != (batch, length)):
        shape = None if keep is None else tuple(keep.shape)
        raise ShapeError(
            f"mass has {length} queries and keep {shape}; expected more than skip={skip} and {(batch, length)}."
        )
    weight = torch.ones(batch, length, device=mass.device) if keep is None else keep.float()
    weight = weight.double()
    flat = 1 / torch.arange(1, length + 1, device=mass.device, dtype=torch.float64)

    def mean(value: Tensor, first: int) -> float:
        return float((value * weight)[:, first:].sum() / weight[:, first:].sum())

    per_query = mass.double().mean(1)
    return FirstKey(mean(per_query, 0), mean(per_query, skip), mean(flat, 0), mean(flat, skip), length, skip)


@dataclass(frozen=True)
class MassiveActivations:
    """Largest absolute value of the residual stream after each layer, and the position of the token that holds it.

    ``mean`` over the layers is the paper's M-Act (which rounds it).
    """

    largest: tuple[float, ...]
    token: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.largest) / len(self.largest)


def massive_activations(hidden: Sequence[Tensor]) -> MassiveActivations:
    """M-Act from the residual stream ``(B, N, dim)`` after each layer, such as ``hidden_states[1:]`` of a Hugging Face model.

    Raises:
        ShapeError: no layers.
    """
    if not hidden:
        raise ShapeError("hidden is empty; expected one (batch, length, dim) tensor per layer.")
    peak = [h.detach().abs().amax(-1) for h in hidden]  # (B, N)
    return MassiveActivations(tuple(float(p.max()) for p in peak), tuple(int(p.argmax()) % p.shape[1] for p in peak))


@dataclass(frozen=True)
class Scores:
    """Gate scores of one layer: mean, shares below 0.5 and 0.1, and a histogram of shares over ``BINS`` bins from 0 to 1."""

    mean: float
    below_half: float
    below_tenth: float
    histogram: tuple[float, ...]


def gate_scores(scores: Tensor) -> Scores:
    """Statistics of scores of any shape; values outside [0, 1] are in no bin."""
    flat = scores.detach().float().flatten()
    bins = torch.histc(flat, BINS, 0.0, 1.0) / flat.numel()
    below = [float((flat < edge).float().mean()) for edge in (0.5, 0.1)]
    return Scores(float(flat.mean()), below[0], below[1], tuple(bins.tolist()))


@dataclass(frozen=True)
class Sparsity:
    """Share of entries below 1e-2 and 1e-3 in magnitude, before the gate, after it, and before it scaled by the mean score (the
    control: what shrinking alone does); and the mean magnitude before and after."""

    before: tuple[float, float]
    after: tuple[float, float]
    control: tuple[float, float]
    magnitude: tuple[float, float]


def hidden_sparsity(before: Tensor, after: Tensor, mean_score: float) -> Sparsity:
    """Sparsity of attention outputs of one shape before and after the gate."""

    def small(x: Tensor) -> tuple[float, float]:
        return float((x.abs() < 1e-2).float().mean()), float((x.abs() < 1e-3).float().mean())

    sizes = float(before.abs().mean()), float(after.abs().mean())
    return Sparsity(small(before), small(after), small(before * mean_score), sizes)


@dataclass(frozen=True)
class LayerReport:
    """One :class:`GatedAttention`: its name, F-Attn, and, where it is gated, scores and (at G1) sparsity."""

    name: str
    first_key: FirstKey
    scores: Scores | None = None
    sparsity: Sparsity | None = None


@dataclass(frozen=True)
class SinkReport:
    """Every gated layer, and the massive activations when the blocks were named."""

    layers: tuple[LayerReport, ...]
    activations: MassiveActivations | None = None

    @property
    def first_key(self) -> float:
        """F-Attn, mean over the layers."""
        return sum(layer.first_key.share for layer in self.layers) / len(self.layers)

    def to_json(self) -> dict[str, Any]:
        extra = {} if self.activations is None else {"massive_activation": self.activations.mean}
        return {**asdict(self), "first_key": self.first_key, **extra}


@torch.no_grad()
def sink_report(
    model: nn.Module, *inputs: Any, blocks: Sequence[nn.Module] = (), keep: Tensor | None = None
) -> SinkReport:
    """Run ``model(*inputs)`` once and report on each of its :class:`GatedAttention` layers, gated or not.

    Args:
        blocks: modules that give the residual stream, for M-Act; ``model.layers`` of a ``DecoderLM``.
        keep: ``(B, N)`` bool, queries that count.

    Raises:
        ConfigError: the model has no such layer. Models of other kinds have their sinks measured by ``foveal.lens.profile_model``.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, GatedAttention)}
    if not found:
        raise ConfigError(f"{type(model).__name__} has no GatedAttention; use foveal.lens.profile_model for its sinks.")
    with _recorded(found, blocks) as (calls, hidden):
        model(*inputs)
    layers = tuple(_layer_report(name, found[name], *call, keep) for name, call in calls.items())
    return SinkReport(layers, massive_activations(hidden) if hidden else None)


def _layer_report(
    name: str, layer: GatedAttention, x: Tensor, positions: Tensor | None, y: Tensor | None, keep: Tensor | None
) -> LayerReport:
    q, k, _ = layer.project(x, positions)
    first = first_key(first_key_mass(q, k, causal=layer.causal), keep)
    gate = layer.gate
    if gate is None or gate.config.kind not in ("input", "constant"):
        return LayerReport(name, first)
    scores = gate_scores(gate.scores(x))
    return LayerReport(name, first, scores, None if y is None else hidden_sparsity(y, gate(x, y), scores.mean))


@contextmanager
def _recorded(
    layers: dict[str, GatedAttention], blocks: Sequence[nn.Module]
) -> Iterator[tuple[dict[str, tuple[Tensor, Tensor | None, Tensor | None]], list[Tensor]]]:
    """What enters every layer, what its G1 gate is given, and what every block gives."""
    calls: dict[str, tuple[Tensor, Tensor | None, Tensor | None]] = {}
    hidden: list[Tensor] = []
    hooks = []
    for name, layer in layers.items():

        def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls[name] = (args[0], kwargs.get("positions"), None)

        hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        if layer.gate is not None and layer.position == "G1":

            def gated(_: nn.Module, args: Any, name: str = name) -> None:
                calls[name] = (*calls[name][:2], args[1])

            hooks.append(layer.gate.register_forward_pre_hook(gated))
    hooks += [b.register_forward_hook(lambda _, __, out: hidden.append(out)) for b in blocks]
    try:
        yield calls, hidden
    finally:
        for hook in hooks:
            hook.remove()
