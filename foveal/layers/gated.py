"""Gated attention (arXiv 2505.06708): softmax attention with one gate, at any of five positions.

From the normed hidden state come q, k, v and the gate; G4, G3 and G2 gate q, k and v right after their projection, then
per-head RMSNorm of q and k, rotary positions, attention; G1 gates each head's output, G5 the projected output. A gate depends on its own
token alone, so decoding needs no state beside keys and values; gated keys and values are what is remembered.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.context import SelectContext
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..core.layouts import Layout
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..patterns.base import Pattern
from .gate import Gate, GateConfig, HeadNorm
from .key_values import KeyValues
from .rotary import rotary, rotate, rotate_halves

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(q (B, H, N, D), k and v (B, Hkv, N, D)) → (B, H, N, D)``: attention and memory of a host model."""


class GatedAttention(nn.Module):
    """Causal self-attention with a gate.

    Args:
        dim: width. num_heads, num_kv_heads: heads; num_kv_heads divides num_heads and defaults to it.
        head_dim: default ``dim / num_heads``.
        gate: None is ordinary attention, the paper's baseline.
        qk_norm: RMSNorm with a weight on each head of q and k. norm_offset: 1 stores that weight minus 1, as Qwen3-Next does.
        bias: of q, k, v and output projections.
        rope_base: of the rotary frequencies; None for no positions. rope_dim: channels that turn; default all.
        rope_halves: pair channel i with i + rope_dim/2, as Hugging Face weights do, instead of neighbours.
        causal: whether a token sees no later one.

    Raises:
        ConfigError: sizes that do not go together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        gate: GateConfig | None = GateConfig(),
        qk_norm: bool = True,
        norm_offset: float = 0.0,
        bias: bool = False,
        rope_base: float | None = 10_000.0,
        rope_dim: int | None = None,
        rope_halves: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(dim, num_heads, kv_heads) < 1 or num_heads % kv_heads or (head_dim is None and dim % num_heads):
            raise ConfigError(
                f"GatedAttention has dim={dim}, num_heads={num_heads}, num_kv_heads={kv_heads}; expected num_heads that divide dim "
                "(or a head_dim), and num_kv_heads that divide num_heads."
            )
        size = dim // num_heads if head_dim is None else head_dim
        turned = size if rope_dim is None else rope_dim
        if rope_base is not None and (turned % 2 or not 0 < turned <= size or (turned < size and not rope_halves)):
            raise ConfigError(
                f"GatedAttention.rope_dim is {turned} for heads of {size}; expected an even number up to that, and rope_halves=True "
                "when it is below. Pass rope_base=None for no positions."
            )
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, size
        self.rope_base, self.rope_dim, self.rope_halves, self.causal = rope_base, turned, rope_halves, causal
        self.q_proj = nn.Linear(dim, num_heads * size, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * size, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * size, bias=bias)
        self.o_proj = nn.Linear(num_heads * size, dim, bias=bias)
        self.q_norm = HeadNorm(size, norm_offset) if qk_norm else None
        self.k_norm = HeadNorm(size, norm_offset) if qk_norm else None
        self.gate = None
        if gate is not None:
            shape = (1, dim) if gate.position == "G5" else (num_heads, size)
            self.gate = Gate(gate, dim, *((kv_heads, size) if gate.position in ("G2", "G3") else shape))

    @property
    def position(self) -> str | None:
        """Of the gate."""
        return None if self.gate is None else self.gate.config.position

    def project(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What attention sees: q ``(B, H, N, D)``, k and v ``(B, Hkv, N, D)``, gated (G2–G4), normed and turned.

        Args:
            x: ``(B, N, dim)``. positions: ``(N,)``; default 0 … N−1.
        """
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self._gated("G4", x, q), self._gated("G3", x, k), self._gated("G2", x, v)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.rope_base is not None:
            place = torch.arange(x.shape[1], device=x.device) if positions is None else positions
            turn = rotary(place[:, None], self.rope_dim, self.rope_base)
            way = rotate_halves if self.rope_halves else rotate
            q, k = way(q, turn), way(k, turn)
        return q, k, v

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
        pattern: Pattern | None = None,
        memory: KeyValues | None = None,
        attend: Attend | None = None,
    ) -> Tensor:
        """``(B, N, dim)`` in and out.

        Args:
            x: ``(B, N, dim)``, normed.
            positions: ``(N,)`` of the new tokens; default counts on from the memory.
            valid: ``(B, n + N)`` bool over remembered and new tokens, False on padding.
            pattern: what is kept; default everything.
            memory: of earlier tokens; grows in place. Needs ``causal``.
            attend: a host model's attention, in place of ``valid``, ``pattern`` and ``memory``.

        Raises:
            ShapeError: x, positions or valid of another shape. UnsupportedError: a memory without ``causal``.
        """
        self._check(x, positions, valid, memory)
        if positions is None and memory is not None:
            positions = torch.arange(memory.length, memory.length + x.shape[1], device=x.device)
        q, k, v = self.project(x, positions)
        y = attend(q, k, v) if attend is not None else self._attend(q, k, v, valid, pattern, memory)
        y = self._gated("G1", x, y.transpose(1, 2))  # (B, N, H, D)
        out = self.o_proj(y.flatten(2))
        return self._gated("G5", x, out[:, :, None])[:, :, 0]

    def _gated(self, position: str, x: Tensor, y: Tensor) -> Tensor:
        return self.gate(x, y) if self.gate is not None and self.position == position else y

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, pattern: Pattern | None, memory: KeyValues | None
    ) -> Tensor:
        before = 0 if memory is None else memory.length
        if memory is not None:
            k, v = memory.extend(k, v)
        base = BaseMask.build(q.shape[2], k.shape[2], causal=self.causal, shift=before, valid=valid, device=q.device)
        scale, layout = self.head_dim**-0.5, None
        if pattern is not None:
            layout = _select(pattern, q, k, SelectContext(base=base, scale=scale, q_offset=before))
        return compute(AttentionCall(q, k, v, layout, base, scale, return_lse=False))[0]

    def _check(self, x: Tensor, positions: Tensor | None, valid: Tensor | None, memory: KeyValues | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.q_proj.in_features:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, length, {self.q_proj.in_features}).")
        if positions is not None and tuple(positions.shape) != (x.shape[1],):
            raise ShapeError(f"positions has shape {tuple(positions.shape)}; expected ({x.shape[1]},), one per token.")
        total = x.shape[1] + (0 if memory is None else memory.length)
        if valid is not None and tuple(valid.shape) != (x.shape[0], total):
            raise ShapeError(
                f"valid has shape {tuple(valid.shape)}; expected {(x.shape[0], total)}, remembered tokens first."
            )
        if memory is not None and not self.causal:
            raise UnsupportedError("a memory goes with causal=True; this layer sees both sides.")


@torch.no_grad()
def _select(pattern: Pattern, q: Tensor, k: Tensor, ctx: SelectContext) -> Layout | None:
    return pattern.select(q.detach(), k.detach(), ctx, None)[0]


__all__ = ["Attend", "GateConfig", "GatedAttention", "HeadNorm", "KeyValues"]
