"""Memory as context (MAC of Titans, arXiv 2501.00663), with a mask that is causal inside a segment too."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from .key_values import KeyValues
from .neural_memory import NeuralMemory
from .rotary import rotary, rotate
from .titans_base import Combine, Titans, TitansState


class MAC(Titans):
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
        k, v = keys.extend(self._join(k_read, k), self._join(v_read, v))
        k, v = torch.cat([k_fixed, k], 2), torch.cat([v_fixed, v], 2)
        own = torch.arange(done, done + n, device=x.device)  # reads and tokens alternate: every row sees a prefix
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
