"""RCMHA (arXiv 2308.03429): attention with a short causal convolution on q, k and v, and learned relative positions.

``A_ij = ((q_i + u)·k_j + q_i·R_r + s_r) / √d`` with r = j − i, softmax over j; q, k and v pass a depthwise convolution of width 3 that all heads share.
Two booleans give the four modules of the paper: MHA (neither), MDHA (``conv``), RMHA (``relative``), RCMHA (both).

Defined by the authors' code, as the paper's text was not available. There the convolution of the queries begins each segment with zeros while keys and values see
the memory; ``paper_compat=True`` does that. The default carries the queries' last inputs too, so that a segment with memory equals a full pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..kernels.relative import relative_attention
from .key_values import KeyValues


@dataclass
class RCMHAMemory:
    """What a stream remembers: keys and values after the convolution, the last inputs of the convolutions ``(B, kernel − 1, 3·dim)``, and
    with ``limit`` only that many keys. Replaced, never changed, by a call."""

    keys: KeyValues
    tail: Tensor
    seen: int = 0

    def detach(self) -> RCMHAMemory:
        """Without its graph: the segment memory of Transformer-XL."""
        keys = self.keys
        if keys.keys is not None and keys.values is not None:
            keys = KeyValues(keys.keys.detach(), keys.values.detach())
        return RCMHAMemory(keys, self.tail.detach(), self.seen)


class RCMHA(nn.Module):
    """Causal self-attention with relative positions and convolutions.

    Args:
        dim: width. num_heads: a divisor of it.
        conv, relative: the two parts. kernel: width of the convolution.
        max_rel: P; there are rows for offsets from −P to P − 1, and offsets beyond use the last one. The released tables have P = 4096.
        qk_bias: of the query and key projections: the authors' plain classes have it, their relative ones do not. Default: ``not relative``.
        paper_compat: queries of a segment do not see the memory through their convolution.
        memory_limit: keys that a memory keeps; None keeps all.

    Raises:
        ConfigError: sizes out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        conv: bool = True,
        relative: bool = True,
        kernel: int = 3,
        max_rel: int = 512,
        qk_bias: bool | None = None,
        paper_compat: bool = False,
        memory_limit: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ConfigError(f"RCMHA has dim={dim} and num_heads={num_heads}; expected num_heads that divide dim.")
        for name, value in (
            ("kernel", kernel),
            ("max_rel", max_rel),
            ("memory_limit", 0 if memory_limit is None else memory_limit),
        ):
            if value < (0 if name == "memory_limit" else 1):
                raise ConfigError(f"RCMHA.{name} is {value}; expected at least {0 if name == 'memory_limit' else 1}.")
        self.num_heads, self.head_dim, self.kernel, self.max_rel = num_heads, dim // num_heads, kernel, max_rel
        self.paper_compat, self.memory_limit = paper_compat, memory_limit
        bias = not relative if qk_bias is None else qk_bias
        self.q_proj, self.k_proj = nn.Linear(dim, dim, bias=bias), nn.Linear(dim, dim, bias=bias)
        self.v_proj, self.o_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        size = self.head_dim
        self.convs = nn.ModuleList(nn.Conv1d(size, size, kernel, groups=size) for _ in range(3)) if conv else None
        self.content_bias = self.rel_table = self.rel_bias = None
        if relative:  # all zero: the layer begins without positions
            self.content_bias = nn.Parameter(torch.zeros(num_heads, size))
            self.rel_table = nn.Parameter(torch.zeros(2 * max_rel, num_heads, size))
            self.rel_bias = nn.Parameter(torch.zeros(2 * max_rel, num_heads))

    def init_memory(self, batch: int) -> RCMHAMemory:
        """The beginning of a stream."""
        weight = self.q_proj.weight
        return RCMHAMemory(KeyValues(), weight.new_zeros(batch, self.kernel - 1, 3 * weight.shape[0]))

    def forward(
        self, x: Tensor, memory: RCMHAMemory | None = None, *, segments: Tensor | None = None
    ) -> tuple[Tensor, RCMHAMemory]:
        """Attend over the memory and, causally, over ``x``.

        Args:
            x: ``(B, N, dim)``. memory: of earlier pieces; default none.
            segments: ``(B, N)`` non-decreasing document numbers of a packed batch; neither attention nor convolution crosses them.

        Returns:
            ``(B, N, dim)`` and the new memory.

        Raises:
            ShapeError: x, memory or segments of another shape, or segments with a memory.
        """
        self._check(x, memory, segments)
        memory = self.init_memory(x.shape[0]) if memory is None else memory
        q, k, v, tail = self._project(x, memory.tail, segments)
        keys = KeyValues(memory.keys.keys, memory.keys.values)
        k, v = keys.extend(k, v)
        before = k.shape[2] - x.shape[1]
        base = BaseMask.build(x.shape[1], k.shape[2], causal=True, shift=before, segments=segments, device=x.device)
        scale = self.head_dim**-0.5
        if self.rel_table is None or self.rel_bias is None or self.content_bias is None:
            y = compute(AttentionCall(q, k, v, None, base, scale, return_lse=False))[0]
        else:
            u, table, bias = (t.to(q.dtype) for t in (self.content_bias, self.rel_table, self.rel_bias))
            y = relative_attention(q, k, v, u, table, bias, base, scale=scale)
        if self.memory_limit is not None and keys.keys is not None and keys.values is not None:
            first = max(keys.length - self.memory_limit, 0)
            keys = KeyValues(keys.keys[:, :, first:], keys.values[:, :, first:])
        out = self.o_proj(y.transpose(1, 2).flatten(2))
        return out, RCMHAMemory(keys, tail, memory.seen + x.shape[1])

    def _project(self, x: Tensor, tail: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = [p(x) for p in (self.q_proj, self.k_proj, self.v_proj)]
        if self.convs is not None:
            before = list(tail.to(parts[0].dtype).chunk(3, -1))
            joined = [torch.cat([a, b], 1) for a, b in zip(before, parts, strict=True)]
            tail = torch.cat(joined, -1)[:, joined[0].shape[1] - (self.kernel - 1) :]
            if self.paper_compat:
                joined[0] = torch.cat([torch.zeros_like(before[0]), parts[0]], 1)
            parts = [self._convolved(c, j, segments) for c, j in zip(self.convs, joined, strict=True)]
        q, k, v = (p.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for p in parts)
        return q, k, v, tail

    def _convolved(self, conv: nn.Module, x: Tensor, segments: Tensor | None) -> Tensor:
        """The same filters for all heads; ``x`` ``(B, kernel − 1 + N, dim)`` → ``(B, N, dim)``."""
        batch = x.shape[0]
        if segments is None:
            heads = x.mT.reshape(batch * self.num_heads, self.head_dim, x.shape[1])
            return conv(heads).view(batch, self.num_heads * self.head_dim, -1).mT
        weight, bias = conv.get_parameter("weight")[:, 0], conv.get_parameter("bias")
        out = bias.repeat(self.num_heads).expand(batch, x.shape[1] - self.kernel + 1, -1)
        number = nn.functional.pad(segments, (self.kernel - 1, 0), value=int(segments.min()) - 1)
        for tap in range(self.kernel):
            stop = x.shape[1] - self.kernel + 1 + tap
            same = (number[:, tap:stop] == segments)[..., None]
            out = out + torch.where(same, x[:, tap:stop], 0.0) * weight[:, tap].repeat(self.num_heads)
        return out

    def _check(self, x: Tensor, memory: RCMHAMemory | None, segments: Tensor | None) -> None:
        dim = self.q_proj.in_features
        if x.dim() != 3 or x.shape[-1] != dim:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, length, {dim}).")
        if memory is not None and tuple(memory.tail.shape) != (x.shape[0], self.kernel - 1, 3 * dim):
            raise ShapeError(
                f"the memory's tail has shape {tuple(memory.tail.shape)}; expected {(x.shape[0], self.kernel - 1, 3 * dim)}. Use init_memory of "
                "this layer, for this batch."
            )
        if segments is not None and (memory is not None or tuple(segments.shape) != tuple(x.shape[:2])):
            raise ShapeError(
                f"segments has shape {tuple(segments.shape)}; expected {tuple(x.shape[:2])}, and no memory beside it."
            )


__all__ = ["RCMHA", "RCMHAMemory"]
