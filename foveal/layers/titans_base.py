"""What the four Titans layers share (arXiv 2501.00663): persistent tokens, the gate, the state of a stream."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..kernels.memory_scan import Weights
from .key_values import KeyValues
from .neural_memory import LayerState, NeuralMemory

EPS = torch.finfo(torch.float32).eps
"""Of the norms of what a memory reads, whatever the dtype: an untrained memory forgets, its reads become as small as that, and torch's
default would then make float32 and float64 two different layers."""


class Combine(nn.Module):
    """``norm₁(y) ⊙ σ(norm₂(m))`` with learned weights; ``(B, N, dim)`` each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.outer, self.inner = nn.RMSNorm(dim, EPS), nn.RMSNorm(dim, EPS)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.outer(y) * torch.sigmoid(self.inner(m))


@dataclass(frozen=True, eq=False)
class TitansState:
    """What a Titans layer carries between pieces of a stream.

    Attributes:
        memory: of the neural memory. position: tokens taken, persistent ones included (MAC: in the current segment).
        keys: of the attention; MAG and MAL: persistent tokens and the last window, MAC: of the current segment.
        before: MAC: the memory's weights when the segment began. tail: MAC: of the convolution that makes its queries.
        segment: MAC: tokens per segment; part of the model.
    """

    memory: LayerState
    position: int = 0
    keys: KeyValues | None = None
    before: Weights | None = None
    tail: Tensor | None = None
    segment: int = 0

    def detach(self) -> TitansState:
        """Without its graph, so that training on a stream can stop at this point."""
        keys = self.keys
        if keys is not None and keys.keys is not None and keys.values is not None:
            keys = KeyValues(keys.keys.detach(), keys.values.detach())
        before = None if self.before is None else tuple(w.detach() for w in self.before)
        tail = None if self.tail is None else self.tail.detach()
        return replace(self, memory=self.memory.detach(), keys=keys, before=before, tail=tail)


class Titans(nn.Module):
    """Persistent tokens and the memory, which all four have.

    Args:
        dim: width. persistent: learned tokens. memory: a :class:`NeuralMemory` of this width; default one with one head.
    """

    def __init__(self, dim: int, persistent: int, memory: NeuralMemory | None) -> None:
        super().__init__()
        if persistent < 0:
            raise ConfigError(f"{type(self).__name__}.persistent is {persistent}; expected at least 0 learned tokens.")
        self.memory = NeuralMemory(dim) if memory is None else memory
        if self.memory.num_heads * self.memory.head_dim != dim or self.memory.qkv.in_features != dim:
            raise ConfigError(
                f"{type(self).__name__} has dim={dim} and a memory from {self.memory.qkv.in_features} to "
                f"{self.memory.num_heads * self.memory.head_dim} channels; expected {dim} both."
            )
        self.dim = dim
        self.persistent = nn.Parameter(torch.randn(persistent, dim) * 0.02)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, length, {self.dim}).")

    def padded(self, x: Tensor, valid: Tensor) -> Tensor:
        """A batch of sequences of different lengths, padded anywhere: every row as if it came alone, zeros on padding.

        Real tokens move to the front, where causality keeps padding from them. No state comes out: rows end at different tokens.

        Args:
            x: ``(B, N, dim)``; what it holds on padding is never read. valid: ``(B, N)`` bool, True on real tokens.

        Raises:
            ShapeError: shapes that do not fit. UnsupportedError: MAC with ``literal``, whose tokens see later ones.
        """
        self._check(x)
        if valid.shape != x.shape[:2] or valid.dtype != torch.bool:
            raise ShapeError(
                f"valid has shape {tuple(valid.shape)} and dtype {valid.dtype}; expected {tuple(x.shape[:2])} bool, True on real tokens."
            )
        if getattr(self, "literal", False):
            raise UnsupportedError(
                "literal=True lets tokens see the padding behind them; run sequences of one length, or MAC without literal."
            )
        order = valid.long().argsort(dim=1, descending=True, stable=True)[..., None].expand_as(x)
        out, _ = self(x.masked_fill(~valid[..., None], 0.0).gather(1, order))
        return torch.zeros_like(out).scatter(1, order, out).masked_fill(~valid[..., None], 0.0)

    def _opened(self, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState, int]:
        """The piece with the persistent tokens before it when the stream begins, a state, and how many were put there."""
        self._check(x)
        if state is not None:
            return x, state, 0
        count = self.persistent.shape[0]
        x = torch.cat([self.persistent.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        return x, TitansState(self.memory.init_state(x.shape[0]), keys=KeyValues()), count
