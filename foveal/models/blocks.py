"""What the backbones share: one forward pass as an object, self-attention under a policy, rotary positions, a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, Selection, State
from ..core.density import Density, measure
from ..core.errors import ConfigError, ShapeError, UnsupportedError
from ..core.serial import check_sizes
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..layers.rotary import check_rotary_heads, rotary, rotate
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..patterns.operator import Operator, attend
from ..policies.policy import Policy


@dataclass
class Memory:
    """What a causal model remembers of a request between calls.

    Attributes:
        keys, values: per layer ``(B, Hkv, n, D)``; empty before the first call.
        states: what each layer's pattern remembers.
        last: per layer ``(B, 1, dim)``, the last token that a :class:`~foveal.models.shift.Shifted` layer was given.
        layers: of the model that fills it; None before the first call.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    last: dict[int, Tensor] = field(default_factory=dict)
    layers: int | None = None

    @property
    def length(self) -> int:
        """Tokens remembered."""
        return next((k.shape[2] for k in self.keys.values()), 0)  # layers of another kind keep none


@dataclass(eq=False)
class Pass:
    """One forward pass of a backbone: what its attention layers share and leave behind.

    Attributes:
        policy: which pattern in which layer, or the operator that every layer runs instead.
        base: the model's own mask for these queries and keys.
        positions: ``(N, A)`` coordinates of the new tokens on A axes (1 for text, 2 for images, 3 for video).
        num_layers: of the backbone.
        memory: keys and values of earlier calls, for causal models.
        states: what patterns remember between passes of one request, such as denoising steps; goes on from call to call.
        grid, step: what patterns are told about the token grid and the denoising step.
        impl: kernel implementation.
        measuring: count what is kept into ``densities``.
        densities: per layer, when ``measuring``.
        selections: what the layers chose in this pass.
        turns: rotary tables, by head size and base, made once for all layers.
    """

    policy: Policy | Operator
    base: BaseMask
    positions: Tensor
    num_layers: int
    memory: Memory | None = None
    states: dict[int, State] = field(default_factory=dict)
    grid: tuple[int, ...] | None = None
    step: int | None = None
    impl: str = "auto"
    measuring: bool = False
    densities: dict[int, Density] = field(default_factory=dict)
    selections: dict[int, Selection] = field(default_factory=dict)
    turns: dict[tuple[int, float], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def turn(self, head_dim: int, rope_base: float) -> tuple[Tensor, Tensor]:
        """Rotary tables of this pass's positions, see :func:`foveal.layers.rotary.rotary`."""
        if (head_dim, rope_base) not in self.turns:
            self.turns[head_dim, rope_base] = rotary(self.positions, head_dim, rope_base)
        return self.turns[head_dim, rope_base]


Method = Policy | Pattern | Operator
"""What a call of a backbone may run: a policy, the same pattern in every layer, or the same operator in every layer."""


def chosen(policy: Method | None) -> Policy | Operator:
    """What a pass runs: dense attention for None, a uniform policy for a pattern, anything else as it is."""
    if isinstance(policy, Operator):
        return policy
    return Policy.of(Dense() if policy is None else policy)


AttentionFactory = Callable[[int], nn.Module]
"""Layer index → a module ``(x (B, N, dim), run: Pass) → (B, N, dim)``."""


class SelfAttention(nn.Module):
    """Multi-head attention under the pass's policy, with rotary positions on any number of axes.

    Args:
        dim: width. num_heads, num_kv_heads: heads; num_kv_heads divides num_heads and defaults to it.
        layer_index: where in the backbone.
        rope_base: base of the rotary frequencies.

    Raises:
        ConfigError: sizes that do not divide each other.
    """

    def __init__(
        self, dim: int, num_heads: int, layer_index: int, num_kv_heads: int | None = None, rope_base: float = 10_000.0
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_sizes(self, dim=dim, num_heads=num_heads, num_kv_heads=kv_heads)
        check_rotary_heads("SelfAttention", dim, num_heads, kv_heads)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, dim // num_heads
        self.layer_index, self.rope_base = layer_index, rope_base
        self.qkv = nn.Linear(dim, (num_heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """``(B, N, dim)`` in and out."""
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(sizes, -1))
        turn = run.turn(self.head_dim, self.rope_base)
        before = q
        q, k = rotate(q, turn), rotate(k, turn)
        out = attend_layer(run, self.layer_index, x, q, k, v, pre_rope_q=before)
        return self.out(out.transpose(1, 2).flatten(2))


def attend_layer(
    run: Pass, layer_index: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor, *, pre_rope_q: Tensor | None = None
) -> Tensor:
    """Attention of one layer under the pass's policy or operator, and its memory: ``(B, H, N, D)``.

    Args:
        x: ``(B, N, dim)`` what entered the layer. q: ``(B, H, N, D)``; k, v: ``(B, Hkv, N, D)`` of the new tokens.
        pre_rope_q: ``(B, H, N, D)`` queries before rotation, where the layer has them.

    Raises:
        ShapeError: a memory of another batch or model.
    """
    offset, states = 0, run.states
    if run.memory is not None:
        offset, states = run.base.shift, run.memory.states
        if layer_index in run.memory.keys:
            check_remembered("keys", run.memory.keys[layer_index], k, 2, layer_index)
            check_remembered("values", run.memory.values.get(layer_index), v, 2, layer_index)
            k = torch.cat([run.memory.keys[layer_index], k], 2)
            v = torch.cat([run.memory.values[layer_index], v], 2)
        run.memory.keys[layer_index], run.memory.values[layer_index] = k, v
    ctx = SelectContext(
        base=run.base, layer_index=layer_index, layer_name=f"layers.{layer_index}", num_layers=run.num_layers,
        q_offset=offset, hidden_states=x, pre_rope_q=pre_rope_q, grid=run.grid, step=run.step, earlier=run.selections,
    )  # fmt: skip
    if isinstance(run.policy, Operator):
        if run.measuring:
            raise UnsupportedError(
                f"measuring counts the pairs that a pattern keeps, and {run.policy.registered_name} is an operator; measure its pattern."
            )
        out, _, states[layer_index] = attend(run.policy, q, k, v, ctx, states.get(layer_index), impl=run.impl)
        return out
    with torch.no_grad():
        layout, state = _pattern(run.policy, ctx).select(q.detach(), k.detach(), ctx, states.get(layer_index))
    states[layer_index] = state
    run.selections[layer_index] = Selection.of(layout, state, q, k)
    if run.measuring:
        run.densities[layer_index] = measure(layout, run.base, q.shape[0], q.shape[1], k.shape[1])
    call = AttentionCall(q, k, v, layout, run.base, q.shape[-1] ** -0.5, return_lse=False)
    return compute(call, run.impl)[0]


def _pattern(policy: Policy, ctx: SelectContext) -> Pattern:
    rule = policy.rule(ctx.layer_index)
    if rule.heads:
        raise UnsupportedError(
            f"the policy has rules for single heads in layer {ctx.layer_index}; foveal's own backbones take one rule a layer."
        )
    return rule.pattern(ctx.decoding)


class Hosted(nn.Module):
    """A layer of ``foveal.layers`` as the attention of a backbone: the pass brings its positions, policy and memory.

    Args:
        layer: called as ``layer(x, positions=…, attend=…)``, such as ``GatedAttention``. layer_index: where in the backbone.
    """

    def __init__(self, layer: nn.Module, layer_index: int) -> None:
        super().__init__()
        self.layer, self.layer_index = layer, layer_index

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """``(B, N, dim)`` in and out."""
        return self.layer(x, positions=run.positions[:, 0], attend=partial(attend_layer, run, self.layer_index, x))


class Recurrent(nn.Module):
    """A layer that carries a state of its own as the attention of a causal backbone; the pass's memory keeps the state.

    Args:
        layer: called as ``layer(x, state) → (out, state)``, such as ``layers.titans.LMM``. layer_index: where in the backbone.
    """

    def __init__(self, layer: nn.Module, layer_index: int) -> None:
        super().__init__()
        self.layer, self.layer_index = layer, layer_index

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """``(B, N, dim)`` in and out."""
        out, state = self.layer(x, None if run.memory is None else run.memory.states.get(self.layer_index))
        if run.memory is not None:
            run.memory.states[self.layer_index] = state
        return out


class Mlp(nn.Module):
    """Gated linear unit with SiLU, ``ratio`` times as wide inside."""

    def __init__(self, dim: int, ratio: float = 2.0) -> None:
        super().__init__()
        inner = int(dim * ratio) if math.isfinite(ratio) else 0
        if inner < 1:
            raise ConfigError(f"ratio is {ratio!r}; expected a finite number of at least 1/dim = {1 / dim:.3g}.")
        self.gate, self.down = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.gate(x).chunk(2, -1)
        return self.down(nn.functional.silu(a) * b)


class Block(nn.Module):
    """Pre-norm block: attention from the factory, then the MLP."""

    def __init__(self, dim: int, attention: nn.Module, ratio: float = 2.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.attention, self.mlp = attention, Mlp(dim, ratio)

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        x = x + self.attention(self.norm1(x), run)
        return x + self.mlp(self.norm2(x))


def factory(dim: int, num_heads: int, num_kv_heads: int | None = None) -> AttentionFactory:
    """The default: :class:`SelfAttention` in every layer."""
    return lambda index: SelfAttention(dim, num_heads, index, num_kv_heads)


def initialise(model: nn.Module, depth: int, seed: int) -> None:
    """Normal weights of variance 1/fan-in from a local generator, biases 0; what writes into the residual stream is scaled by
    1/√(2·depth)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                std = p.shape[1] ** -0.5 if "embed" not in name else 0.02
                if name.endswith(
                    ("attention.out.weight", "layer.o_proj.weight", "layer.out.weight", "mlp.down.weight")
                ):
                    std /= (2 * depth) ** 0.5
                p.copy_(torch.randn(p.shape, generator=g) * std)
            elif name.endswith("bias"):
                p.zero_()


def check_depth(memory: Memory, layers: int) -> None:
    """Raise :class:`ShapeError` unless ``memory`` is new or of a model of as many layers."""
    if not isinstance(memory, Memory):
        raise ShapeError(f"memory is a {type(memory).__name__}; expected a Memory.")
    if memory.layers not in (None, layers):
        raise ShapeError(f"memory has {memory.layers} layers; expected the {layers} of this model.")


def check_remembered(name: str, kept: Tensor | None, new: Tensor, axis: int, layer_index: int) -> None:
    """Raise :class:`ShapeError` unless what the memory kept has the shape of ``new`` but for its length on ``axis``."""
    shape, expected = None if kept is None else tuple(kept.shape), tuple(new.shape)
    if shape is None or shape[:axis] + shape[axis + 1 :] != expected[:axis] + expected[axis + 1 :]:
        wanted = ", ".join("length" if i == axis else str(n) for i, n in enumerate(expected))
        raise ShapeError(f"memory has {name} of shape {shape} in layer {layer_index}; expected ({wanted}).")


def check_marks(name: str, marks: Tensor, ids: Tensor) -> None:
    """Raise :class:`ShapeError` unless ``marks`` is a bool for every token of ``ids``."""
    if marks.shape != ids.shape or marks.dtype != torch.bool:
        raise ShapeError(
            f"{name} has shape {tuple(marks.shape)} and dtype {marks.dtype}; expected that of ids, {tuple(ids.shape)}, of bool."
        )


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raise :class:`ShapeError` unless ``ids`` is ``(B, N)`` of tokens below ``vocab_size``."""
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ShapeError(f"ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; expected (batch, length) int64.")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise ShapeError(f"ids spans {int(ids.min())}…{int(ids.max())}; expected tokens from 0 to {vocab_size - 1}.")
