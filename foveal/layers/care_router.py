"""CARE-Edit's router (arXiv 2603.08589): each token picks its top K of four condition experts, and losses on where it went."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError

EXPERTS = ("text", "base", "ref", "mask")


@dataclass(frozen=True, eq=False)
class Routed:
    """Result of routing: ``weights`` ``(B, N, E)`` that sum to 1, zero outside the chosen experts and the shared one;
    ``chosen`` ``(B, N, E)`` bool; ``probabilities``, the softmax over all present experts; ``logits``; and the running ``means``
    ``(E,)`` to hand to the next training step."""

    weights: Tensor
    chosen: Tensor
    probabilities: Tensor
    logits: Tensor
    means: Tensor


class Router(nn.Module):
    """``α_{i,e} = MLP_e([W_k h_i ‖ q]) + b_e``, top K, softmax at temperature τ over the chosen, a share for one expert.

    Args:
        dim: width of tokens. context: width of the query q. hidden: of the two-layer MLPs; default ``dim / 4``.
        top_k: K. share: λ of the expert that is always active, here ``"base"`` (our choice, the paper names none of its four).
        smoothing: in training, how much of a batch's mean logit per expert is replaced by the running mean; tokens of a batch
            keep their differences (a reconstruction of "EMA-smoothed logits").

    Raises:
        ConfigError: numbers out of range.
    """

    def __init__(
        self,
        dim: int,
        context: int,
        *,
        hidden: int | None = None,
        top_k: int = 3,
        share: float = 0.1,
        smoothing: float = 0.9,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= len(EXPERTS):
            raise ConfigError(f"Router.top_k is {top_k}; expected 1 to {len(EXPERTS)}.")
        for name, value in (("share", share), ("smoothing", smoothing)):
            if not 0 <= value <= 1:
                raise ConfigError(f"Router.{name} is {value}; expected 0 to 1.")
        width = max(1, dim // 4) if hidden is None else hidden
        self.top_k, self.share, self.smoothing = top_k, share, smoothing
        self.key = nn.Linear(dim, dim, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim + context, width), nn.GELU(), nn.Linear(width, 1)) for _ in EXPERTS
        )

    def forward(
        self, h: Tensor, query: Tensor, present: Tensor, *, temperature: float = 1.0, means: Tensor | None = None
    ) -> Routed:
        """Route.

        Args:
            h: ``(B, N, dim)``. query: ``(B, context)``. present: ``(B, E)`` bool, at least one expert per row.
            temperature: τ; the paper anneals it (here 2.0 → 0.5 is suggested). means: ``(E,)`` of the training step before.

        Raises:
            ConfigError: a temperature of 0 or less, or a row without any expert.
        """
        if not temperature > 0:
            raise ConfigError(f"temperature is {temperature}; expected above 0.")
        if not bool(present.any(-1).all()):
            raise ConfigError(
                "router: a sample has no condition at all; expected at least one of text, base, ref, mask."
            )
        read = torch.cat([self.key(h), query[:, None].expand(-1, h.shape[1], -1)], -1)
        work = torch.promote_types(h.dtype, torch.float32)
        logits = torch.cat([expert(read) for expert in self.experts], -1).to(work)
        mean = logits.detach().mean((0, 1))
        running = mean if means is None else self.smoothing * means.to(work) + (1 - self.smoothing) * mean
        if self.training and means is not None:
            logits = logits + self.smoothing * (means.to(work) - mean)
        return self.select(logits, present, temperature, running)

    def select(self, logits: Tensor, present: Tensor, temperature: float, means: Tensor) -> Routed:
        """Top K of ``logits`` ``(B, N, E)`` among the ``present`` experts and their weights."""
        logits = logits.masked_fill(~present[:, None], -torch.inf)
        index = logits.topk(self.top_k, -1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, True) & present[:, None]
        weights = torch.softmax((logits / temperature).masked_fill(~chosen, -torch.inf), -1)
        base = EXPERTS.index("base")
        share = self.share * present[:, None, base : base + 1].to(weights.dtype)
        always = torch.zeros(len(EXPERTS), dtype=weights.dtype, device=weights.device)
        always[base] = 1.0
        weights = (1 - share) * weights + share * always
        return Routed(weights, chosen, torch.softmax(logits, -1), logits, means)


def timestep_features(time: Tensor, dim: int) -> Tensor:
    """Sinusoids ψ ``(B, dim)`` of diffusion times ``(B,)`` from 0 to 1."""
    half = dim // 2
    rate = torch.exp(-math.log(10_000.0) * torch.arange(half, device=time.device) / max(half, 1))
    angle = 1000.0 * time[:, None] * rate
    return torch.cat([angle.cos(), angle.sin(), time.new_zeros(len(time), dim - 2 * half)], -1)


def load_loss(probabilities: Tensor) -> Tensor:
    """``Σ_e (mean_i π_{i,e} − 1/E)²``: 0 for an even load, 0.75 when all four collapse onto one."""
    mean = probabilities.flatten(0, 1).mean(0)
    return (mean - 1 / len(mean)).square().sum()


def mixture_loss(weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """``Σ_e ‖∇w_e‖₁`` by finite differences on the token grid, a mean over places; 0 for weights that are the same everywhere.

    The paper multiplies it by λ_tv and again by λ_mix; here λ_tv is 1.
    """
    return _variation(weights.mT.unflatten(-1, grid)).sum()


def mask_loss(mask: Tensor, target: Tensor, smooth: float = 0.1) -> Tensor:
    """``‖∇M̂ − ∇M_gt‖₁ + λ ‖∇²M̂‖₁`` of masks ``(B, 1, H, W)``, means over places; blind to a constant between both."""
    first = _variation(mask - target).sum()
    second = sum(
        (mask.diff(n=2, dim=axis).abs().mean() if mask.shape[axis] > 2 else mask.new_zeros(())) for axis in (-2, -1)
    )
    return first + smooth * second


def _variation(maps: Tensor) -> Tensor:
    """Mean absolute differences along both axes per map, ``(B, E, H, W)`` → ``(E,)``."""
    total = maps.new_zeros(maps.shape[1])
    for axis in (-2, -1):
        if maps.shape[axis] > 1:
            total = total + maps.diff(dim=axis).abs().mean((0, -2, -1))
    return total
