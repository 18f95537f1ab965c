"""Titans (arXiv 2501.00663): a neural memory alone (LMM), before attention (MAL), beside it (MAG), or as its context (MAC).

All four map ``x (B, N, dim)`` to ``(out, state)`` without a residual, take pieces of a stream of any length, and carry a state of constant size.
P are learned persistent tokens, put before the sequence once (LMM, MAG, MAL: they pass through the memory too) or into every segment (MAC).

Our readings: ``y ⊗ m`` is ``norm₁(y) ⊙ σ(norm₂(m))``; MAL's window keeps P visible as MAG's does; MAC gives the rows of the segment's tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..patterns.sliding_window import SlidingWindow
from .gated import GatedAttention
from .key_values import KeyValues
from .neural_memory import LayerState, NeuralMemory
from .titans_base import EPS, Combine, Titans, TitansState
from .titans_mac import MAC


class LMM(Titans):
    """The memory as a layer of its own: its reads, normalised, gated by a linear layer, projected.

    Args:
        dim: width. persistent: learned tokens before the sequence. memory: default one head, two layers.
    """

    def __init__(self, dim: int, *, persistent: int = 4, memory: NeuralMemory | None = None) -> None:
        super().__init__(dim, persistent, memory)
        self.norm = nn.RMSNorm(dim, EPS)
        self.gate, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Tensor, state: TitansState | None = None, *, valid: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        """``(B, N, dim)`` and the new state; ``valid`` ``(B, N)`` bool, False where the memory must not learn.

        Raises:
            ShapeError: x or a state of another shape.
        """
        x, state, added = self._opened(x, state)
        if valid is not None:
            valid = F.pad(valid, (added, 0), value=True)
        m, memory, _ = self.memory(x, state.memory, valid=valid)
        out = self.out(self.norm(m) * F.silu(self.gate(x)))
        return out[:, added:], replace(state, memory=memory, position=state.position + x.shape[1])


class _Windowed(Titans):
    """MAG and MAL: attention over the persistent tokens and the last ``window`` tokens.

    Args:
        dim: width. num_heads: of the attention. window: tokens that a token sees, itself included.
        persistent, memory: see :class:`LMM`. rope_base: of the rotary positions; None for none.

    Raises:
        ConfigError: sizes that do not go together.
    """

    def __init__(
        self, dim: int, num_heads: int, *, window: int = 128, persistent: int = 4, memory: NeuralMemory | None = None,
        rope_base: float | None = 10_000.0,
    ) -> None:  # fmt: skip
        super().__init__(dim, persistent, memory)
        self.pattern = SlidingWindow(window, sinks=persistent)
        self.attention = GatedAttention(dim, num_heads, gate=None, qk_norm=False, rope_base=rope_base)

    def _attend(self, x: Tensor, state: TitansState) -> tuple[Tensor, KeyValues]:
        """Attention over what is remembered and new, and what the next piece will see of it."""
        keys = KeyValues() if state.keys is None else KeyValues(state.keys.keys, state.keys.values)
        positions = torch.arange(state.position, state.position + x.shape[1], device=x.device)
        y = self.attention(x, positions=positions, pattern=self.pattern, memory=keys)
        first, last = self.pattern.sinks, self.pattern.window - 1
        if keys.keys is not None and keys.values is not None and keys.length > first + last:
            both = (torch.cat([t[:, :, :first], t[:, :, keys.length - last :]], 2) for t in (keys.keys, keys.values))
            keys = KeyValues(*both)
        return y, keys


class MAG(_Windowed):
    """Memory as a gate: windowed attention of ``[P, x]``, combined with the memory's reads of ``[P, x]``."""

    def __init__(
        self, dim: int, num_heads: int, *, window: int = 128, persistent: int = 4, memory: NeuralMemory | None = None,
        rope_base: float | None = 10_000.0,
    ) -> None:  # fmt: skip
        super().__init__(dim, num_heads, window=window, persistent=persistent, memory=memory, rope_base=rope_base)
        self.combine = Combine(dim)

    def forward(self, x: Tensor, state: TitansState | None = None) -> tuple[Tensor, TitansState]:
        """``(B, N, dim)`` and the new state."""
        x, state, added = self._opened(x, state)
        y, keys = self._attend(x, state)
        m, memory, _ = self.memory(x, state.memory)
        state = replace(state, memory=memory, keys=keys, position=state.position + x.shape[1])
        return self.combine(y, m)[:, added:], state


class MAL(_Windowed):
    """Memory as a layer: windowed attention over the memory's reads of ``[P, x]``."""

    def forward(self, x: Tensor, state: TitansState | None = None) -> tuple[Tensor, TitansState]:
        """``(B, N, dim)`` and the new state."""
        x, state, added = self._opened(x, state)
        m, memory, _ = self.memory(x, state.memory)
        y, keys = self._attend(m, state)
        return y[:, added:], replace(state, memory=memory, keys=keys, position=state.position + x.shape[1])


__all__ = ["LMM", "MAC", "MAG", "MAL", "Combine", "LayerState", "NeuralMemory", "TitansState"]
