"""Titans (arXiv 2501.00663): a neural memory alone (LMM), before attention (MAL), beside it (MAG), or as its context (MAC).

All four map ``x (B, N, dim)`` to ``(out, state)`` without a residual, take pieces of a stream of any length, and carry a state of constant size.
P are learned persistent tokens, put before the sequence once (LMM, MAG, MAL: they pass through the memory too) or into every segment (MAC).

Our readings: ``y ⊗ m`` is ``norm₁(y) ⊙ σ(norm₂(m))``; MAL's window keeps P visible as MAG's does; MAC gives the rows of the segment's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..kernels.memory_scan import Weights
from ..patterns.sliding_window import SlidingWindow
from .gated import GatedAttention
from .key_values import KeyValues
from .neural_memory import LayerState, NeuralMemory
from .rotary import rotary, rotate


class Combine(nn.Module):
    """``norm₁(y) ⊙ σ(norm₂(m))`` with learned weights; ``(B, N, dim)`` each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.outer, self.inner = nn.RMSNorm(dim), nn.RMSNorm(dim)

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


class _Titans(nn.Module):
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

    def _opened(self, x: Tensor, state: TitansState | None) -> tuple[Tensor, TitansState, int]:
        """The piece with the persistent tokens before it when the stream begins, a state, and how many were put there."""
        self._check(x)
        if state is not None:
            return x, state, 0
        count = self.persistent.shape[0]
        x = torch.cat([self.persistent.to(x.dtype).expand(x.shape[0], -1, -1), x], 1)
        return x, TitansState(self.memory.init_state(x.shape[0]), keys=KeyValues()), count


class LMM(_Titans):
    """The memory as a layer of its own: its reads, normalised, gated by a linear layer, projected.

    Args:
        dim: width. persistent: learned tokens before the sequence. memory: default one head, two layers.
    """

    def __init__(self, dim: int, *, persistent: int = 4, memory: NeuralMemory | None = None) -> None:
        super().__init__(dim, persistent, memory)
        self.norm = nn.RMSNorm(dim)
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


class _Windowed(_Titans):
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


class MAC(_Titans):
    """Memory as context: each segment attends to P, to reads of the memory made with its own queries, and to itself.

    The paper puts all reads of a segment before it, so a token sees reads that later tokens made. Here token i sees the reads and tokens
    up to i, and is combined with the memory as of its own position. ``literal`` is the paper's form: all reads of the segment, and the
    memory after the whole of it. It leaks, and takes whole segments alone.

    Args:
        dim: width. num_heads: of the attention. segment: C, tokens per segment; part of the model.
        persistent, memory: see :class:`LMM`. rope_base: positions count P from 0, then the segment; a read shares its token's position.
        literal: the paper's mask and gate.

    Raises:
        ConfigError: sizes that do not go together.
    """

    def __init__(
        self, dim: int, num_heads: int, *, segment: int = 64, persistent: int = 4, memory: NeuralMemory | None = None,
        rope_base: float | None = 10_000.0, literal: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dim, persistent, memory)
        if num_heads < 1 or dim % num_heads or (rope_base is not None and dim // num_heads % 2) or segment < 1:
            raise ConfigError(
                f"MAC has dim={dim}, num_heads={num_heads}, segment={segment}; expected heads of an even size that divide dim, and a "
                "segment of at least 1 token."
            )
        self.num_heads, self.segment, self.rope_base, self.literal = num_heads, segment, rope_base, literal
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.combine = Combine(dim)

    def init_state(self, batch: int) -> TitansState:
        """The beginning of a stream."""
        memory = self.memory.init_state(batch)
        return TitansState(memory, 0, KeyValues(), memory.memory.weights, None, self.segment)

    def forward(self, x: Tensor, state: TitansState | None = None) -> tuple[Tensor, TitansState]:
        """``(B, N, dim)`` and the new state.

        Raises:
            ShapeError: x of another shape, or a state of another segment. UnsupportedError: ``literal`` with a part of a segment before the end.
        """
        self._check(x)
        state = self.init_state(x.shape[0]) if state is None else state
        if state.segment != self.segment:
            raise ShapeError(
                f"the state was made with segment {state.segment} and the layer has {self.segment}; expected the same. Use init_state of this layer."
            )
        if self.literal and state.position:
            raise UnsupportedError("literal=True needs pieces of whole segments; the last piece ended inside one.")
        outs = []
        start = 0
        while start < x.shape[1]:
            stop = min(start + self.segment - state.position, x.shape[1])
            out, state = self._piece(x[:, start:stop], state)
            outs.append(out)
            start = stop
        return (torch.cat(outs, 1) if outs else x), state

    def _piece(self, x: Tensor, state: TitansState) -> tuple[Tensor, TitansState]:
        """Tokens of one segment."""
        assert state.before is not None and state.keys is not None
        h, tail = self.memory.read(x, state.before, state.tail)
        y, keys = self._attend(x, h, state)
        m, memory, _ = self.memory(y, state.memory)
        if self.literal:
            m, _ = self.memory.read(y, memory.memory.weights, state.memory.tail)
        position = state.position + x.shape[1]
        out = self.combine(y, m)
        if position == self.segment:
            return out, replace(
                state, memory=memory, position=0, keys=KeyValues(), before=memory.memory.weights, tail=tail
            )
        return out, replace(state, memory=memory, position=position, keys=keys, tail=tail)

    def _attend(self, x: Tensor, h: Tensor, state: TitansState) -> tuple[Tensor, KeyValues]:
        count, n, done = self.persistent.shape[0], x.shape[1], state.position
        q, k, v = self._heads(self.qkv(x))
        _, k_read, v_read = self._heads(self.qkv(h))
        _, k_fixed, v_fixed = self._heads(self.qkv(self.persistent.to(x.dtype).expand(x.shape[0], -1, -1)))
        place = torch.arange(count + done, count + done + n, device=x.device)
        q, k, k_read = self._turn(q, place), self._turn(k, place), self._turn(k_read, place)
        k_fixed = self._turn(k_fixed, torch.arange(count, device=x.device))
        assert state.keys is not None
        keys = KeyValues(state.keys.keys, state.keys.values)
        k, v = keys.extend(
            self._join(k_read, k), self._join(v_read, v)
        )  # read, token, read, token, …: a prefix per row
        k, v = torch.cat([k_fixed, k], 2), torch.cat([v_fixed, v], 2)
        own = torch.arange(done, done + n, device=x.device)
        seen = count + (n + own + 1 if self.literal else 2 * (own + 1))
        total = k.shape[2]
        everything = torch.arange(total, device=x.device)[None]
        base = BaseMask(n, total, torch.zeros_like(seen)[None], seen[None], 0, False, everything)
        y = compute(AttentionCall(q, k, v, None, base, q.shape[-1] ** -0.5, return_lse=False))[0]
        return self.out(y.transpose(1, 2).flatten(2)), keys

    def _join(self, reads: Tensor, tokens: Tensor) -> Tensor:
        """``(B, H, 2·n, D)``: alternating, or all reads first."""
        if self.literal:
            return torch.cat([reads, tokens], 2)
        return torch.stack([reads, tokens], 3).flatten(2, 3)

    def _heads(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = y.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        return x if self.rope_base is None else rotate(x, rotary(place[:, None], x.shape[-1], self.rope_base))


__all__ = ["LMM", "MAC", "MAG", "MAL", "Combine", "LayerState", "NeuralMemory", "TitansState"]
