"""The neural-memory layer of Titans (arXiv 2501.00663): projections, short convolutions, gates, and the scan of ``kernels.memory_scan``.

Not in the paper, and so arguments here: how the gates come from the token (one linear layer, sigmoids, per head), the memory's width and activation, the
chunk, the convolution's width. The paper's "depthwise-separable" convolution is a depthwise one here; the projection before it is its pointwise half.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, nearest
from ..kernels.call import compute_dtype
from ..kernels.memory_scan import ACTIVATIONS, MemoryState, Weights, memory_scan, read


@dataclass(frozen=True, eq=False)
class LayerState:
    """What a :class:`NeuralMemory` carries: the memory, and the last inputs of its convolutions ``(B, width − 1, 3·heads·D)``."""

    memory: MemoryState
    tail: Tensor

    def detach(self) -> LayerState:
        """Without its graph."""
        return LayerState(self.memory.detach(), self.tail.detach())


class NeuralMemory(nn.Module):
    """A memory that learns every token's key → value and is read with its query.

    Args:
        dim: width. num_heads: memories side by side. head_dim: default ``dim / num_heads``.
        depth: layers of the memory; 1 is a matrix. expand: inner width over ``head_dim``. activation: between its layers.
        chunk: tokens whose gradients are taken at the same memory; part of the model.
        conv: width of the causal convolutions of q, k and v; 1 for none.
        momentum, decay: False fixes η or α at 0.
        theta_max: largest step; default ``1 / (2·chunk)``: a chunk adds up its gradients before any is corrected, and after SiLU all keys
            lie close to each other, so that the sum grows like the chunk.
        clip: largest norm of one token's gradient.
        recompute: store no chunk's activations for the backward pass.

    Raises:
        ConfigError: sizes or names that do not go together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        head_dim: int | None = None,
        *,
        depth: int = 2,
        expand: float = 4.0,
        activation: str = "gelu",
        chunk: int = 16,
        conv: int = 4,
        momentum: bool = True,
        decay: bool = True,
        theta_max: float | None = None,
        clip: float | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if min(dim, num_heads) < 1 or (head_dim is None and dim % num_heads):
            raise ConfigError(
                f"NeuralMemory has dim={dim}, num_heads={num_heads}; expected heads that divide dim, or a head_dim."
            )
        size = dim // num_heads if head_dim is None else head_dim
        for name, value in (("head_dim", size), ("depth", depth), ("chunk", chunk), ("conv", conv)):
            if value < 1:
                raise ConfigError(f"NeuralMemory.{name} is {value}; expected at least 1.")
        for name, number in (("theta_max", theta_max), ("expand", expand)):
            if number is not None and not number > 0:
                raise ConfigError(f"NeuralMemory.{name} is {number}; expected a number above 0.")
        if activation not in ACTIVATIONS:
            raise ConfigError(f"NeuralMemory.activation is {activation!r}. {nearest(activation, ACTIVATIONS)}")
        self.num_heads, self.head_dim, self.chunk, self.conv_width = num_heads, size, chunk, conv
        self.activation, self.clip, self.recompute = activation, clip, recompute
        self.momentum, self.decay = momentum, decay
        self.theta_max = 0.5 / chunk if theta_max is None else theta_max
        width = num_heads * size
        self.qkv = nn.Linear(dim, 3 * width, bias=False)
        self.conv = nn.Conv1d(3 * width, 3 * width, conv, groups=3 * width) if conv > 1 else None
        self.gates = nn.Linear(dim, 3 * num_heads, bias=False)
        start = torch.tensor([-4.0, 0.0, 0.0])  # of α, η, θ before their sigmoids: forget little at first
        self.gate_offset = nn.Parameter(start.repeat_interleave(num_heads))
        inner = max(int(size * expand), 1)
        sizes = [size, *[inner] * (depth - 1), size]
        self.initial = nn.ParameterList(
            nn.Parameter(torch.randn(num_heads, o, i) * i**-0.5) for i, o in pairwise(sizes)
        )

    def init_state(self, batch: int) -> LayerState:
        """An untouched memory for ``batch`` sequences; gradients reach the learned M_0 through it."""
        dtype = compute_dtype(self.qkv.weight.dtype)
        weights = tuple(w.to(dtype).expand(batch, *w.shape) for w in self.initial)
        tail = self.qkv.weight.new_zeros(batch, self.conv_width - 1, self.qkv.out_features)
        return LayerState(MemoryState.start(weights, self.chunk), tail)

    def forward(
        self, x: Tensor, state: LayerState | None = None, *, valid: Tensor | None = None, impl: str = "chunked"
    ) -> tuple[Tensor, LayerState, Tensor]:
        """Update with every token, read after each.

        Args:
            x: ``(B, N, dim)``. state: of the previous piece; default untouched.
            valid: ``(B, N)`` bool; tokens that are False leave the memory alone. Pad on the right: the convolutions do see them.
            impl: of the scan.

        Returns:
            ``(B, N, heads·D)`` reads, the new state, and ``(B, heads, N)`` surprise: the norm of each token's gradient.

        Raises:
            ShapeError: x of another shape, or a state of another batch or chunk.
        """
        state = self._checked(x, state)
        q, k, v, tail = self._project(x, state.tail)
        alpha, eta, theta = self.gate_values(x)
        out, memory, surprise = memory_scan(
            q, k, v, alpha, eta, theta, state.memory, activation=self.activation, clip=self.clip, valid=valid, impl=impl,
            recompute=self.recompute,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2), LayerState(memory, tail), surprise

    def read(self, x: Tensor, weights: Weights, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Read one memory for all tokens of ``x`` ``(B, N, dim)`` without an update: ``(B, N, heads·D)``, and the convolutions' tail."""
        if tail is None:
            tail = self.qkv.weight.new_zeros(x.shape[0], self.conv_width - 1, self.qkv.out_features)
        q, _, _, tail = self._project(x, tail)
        return read(q, weights, self.activation).transpose(1, 2).flatten(2), tail

    def gate_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """α, η and θ, each ``(B, heads, N)``."""
        alpha, eta, theta = (self.gates(x) + self.gate_offset).sigmoid().mT.chunk(3, 1)
        alpha = alpha if self.decay else torch.zeros_like(alpha)
        return alpha, eta if self.momentum else torch.zeros_like(eta), theta * self.theta_max

    def _project(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = self.qkv(x)
        if self.conv is not None:
            y = torch.cat([tail.to(y.dtype), y], 1)
            tail = y[:, y.shape[1] - self.conv_width + 1 :]
            y = self.conv(y.mT).mT
        q, k, v = F.silu(y).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, tail

    def _checked(self, x: Tensor, state: LayerState | None) -> LayerState:
        if x.dim() != 3 or x.shape[-1] != self.qkv.in_features:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, length, {self.qkv.in_features}).")
        if state is None:
            return self.init_state(x.shape[0])
        if state.memory.chunk != self.chunk:
            raise ShapeError(
                f"the state was made with chunk {state.memory.chunk} and the layer has {self.chunk}; another chunk is another model. "
                "Use init_state of this layer."
            )
        if state.tail.shape[0] != x.shape[0]:
            raise ShapeError(f"the state is of batch {state.tail.shape[0]} and x of {x.shape[0]}; expected the same.")
        return state
