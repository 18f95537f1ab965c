"""One gate of Gated Attention (arXiv 2505.06708): a score of the hidden state that multiplies or is added to a tensor with heads.

``Y' = Y ⊙ act(X·W)`` or ``Y' = Y + act(X·W)``, with X the normed hidden state that enters attention. ``ns_sigmoid`` is
``0.5 + 0.5·σ(x)``, reconstructed from the range [0.5, 1] that the paper states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError, nearest
from ..core.serial import check_types

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "identity": lambda x: x,
    "ns_sigmoid": lambda x: 0.5 + 0.5 * torch.sigmoid(x),
}
CHOICES: dict[str, tuple[str, ...]] = {
    "position": ("G1", "G2", "G3", "G4", "G5"),
    "kind": ("input", "constant", "rmsnorm", "silu"),
    "granularity": ("elementwise", "headwise"),
    "sharing": ("specific", "shared"),
    "mode": ("multiplicative", "additive"),
    "activation": tuple(ACTIVATIONS),
    "mean": ("logits", "scores"),
    "init": ("linear", "zero", "identity"),
}
"""Every value of every field of :class:`GateConfig`."""
OPEN = 4.0
"""Bias of ``init="identity"``: σ(4) = 0.982."""


@dataclass(frozen=True)
class GateConfig:
    """Where the gate sits and what it is; the defaults are the paper's best (G1, elementwise, head-specific, sigmoid).

    Attributes:
        position: G1 attention output per head, G2 values, G3 keys, G4 queries, G5 output of the projection.
        kind: ``"input"`` (scores from the hidden state), ``"constant"`` (one learned score for all tokens, starting at 0), or a
            function without scores in the gate's place: ``"rmsnorm"`` on each head's vector, ``"silu"``.
        granularity: one score per channel, or one per head.
        sharing: ``"shared"`` averages the scores over the heads; the parameters stay those of all heads.
        mode: multiply or add. activation: of the scores.
        mean: what ``"shared"`` averages; the paper does not say, so ``"logits"`` is our choice.
        init: ``"linear"`` is torch's; ``"zero"`` zero weights; ``"identity"`` (ours, for trained models) zero weights and, when
            multiplying, a bias of 4, so that the layer begins close to ungated.

    Raises:
        ConfigError: an unknown value, or values that do not go together.
    """

    position: str = "G1"
    kind: str = "input"
    granularity: str = "elementwise"
    sharing: str = "specific"
    mode: str = "multiplicative"
    activation: str = "sigmoid"
    mean: str = "logits"
    init: str = "linear"

    def __post_init__(self) -> None:
        check_types(self)
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(f"GateConfig.{name} is {value!r}. {nearest(value, known)}")
        if self.position == "G5" and (self.granularity, self.sharing) != ("elementwise", "specific"):
            raise ConfigError(
                f"GateConfig.position is 'G5' with granularity={self.granularity!r} and sharing={self.sharing!r}; the projected "
                "output has no heads: expected 'elementwise' and 'specific'."
            )
        if self.kind in ("rmsnorm", "silu") and self.position != "G1":
            raise ConfigError(
                f"GateConfig.kind is {self.kind!r} at {self.position}; expected position 'G1', where the paper has it."
            )
        if self.init == "identity" and not self.starts_as_identity:
            raise ConfigError(
                f"GateConfig.init is 'identity' for a {self.mode} {self.activation} of kind {self.kind!r}; expected kind 'input' and a "
                "multiplicative sigmoid or ns_sigmoid, or an additive silu or identity."
            )

    @property
    def starts_as_identity(self) -> bool:
        """Whether some weights make the gate (nearly) change nothing."""
        wanted = ("sigmoid", "ns_sigmoid") if self.mode == "multiplicative" else ("silu", "identity")
        return self.kind == "input" and self.activation in wanted


class HeadNorm(nn.Module):
    """RMSNorm of each head's vector ``(…, D)`` with a weight; ``offset`` 1 stores the weight minus 1, as Qwen3-Next does."""

    def __init__(self, head_dim: int, offset: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.offset, self.eps = offset, eps
        self.weight = nn.Parameter(torch.full((head_dim,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of ``x``, computed in float32 or above."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (scaled * (self.weight.to(wide.dtype) + self.offset)).to(x.dtype)


class Gate(nn.Module):
    """The gate of a tensor ``(B, N, heads, head_dim)``.

    Args:
        config: what it is. dim: width of the hidden state. heads, head_dim: of the gated tensor.
    """

    def __init__(self, config: GateConfig, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.config, self.heads = config, heads
        self.width = head_dim if config.granularity == "elementwise" else 1
        if config.kind == "input":
            biased = config.init == "identity" and config.mode == "multiplicative"
            self.proj = nn.Linear(dim, heads * self.width, bias=biased)
            with torch.no_grad():
                if config.init != "linear":
                    self.proj.weight.zero_()
                if biased:
                    self.proj.bias.fill_(OPEN)
        elif config.kind == "constant":
            self.theta = nn.Parameter(torch.zeros(heads * self.width))
        elif config.kind == "rmsnorm":
            self.norm = HeadNorm(head_dim)

    def scores(self, x: Tensor) -> Tensor:
        """``(B, N, heads, head_dim)``, with 1 for heads when shared and for head_dim when headwise.

        Args:
            x: ``(B, N, dim)`` hidden state.
        """
        config, act = self.config, ACTIVATIONS[self.config.activation]
        constant = config.kind == "constant"
        logits = self.theta.to(x.dtype).expand(*x.shape[:2], -1) if constant else self.proj(x)
        logits = logits.unflatten(-1, (self.heads, self.width))
        if config.sharing == "specific":
            return act(logits)
        return act(logits.mean(2, True)) if config.mean == "logits" else act(logits).mean(2, True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Gate ``y`` ``(B, N, heads, head_dim)`` by the hidden state ``x`` ``(B, N, dim)``; the result has y's dtype."""
        if self.config.kind == "rmsnorm":
            return self.norm(y)
        if self.config.kind == "silu":
            return F.silu(y)
        score = self.scores(x).to(y.dtype)
        return y * score if self.config.mode == "multiplicative" else y + score

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self.config, name)}" for name in CHOICES)
