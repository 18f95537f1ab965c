"""Decode steps of a small model whose caches are full from the start: each step writes its keys and values into the last place.

The backbone's own memory copies the whole cache at every step, which a serving engine does not. A few caches of full size are
dealt to the layers in turn: every layer reads as much as if it had its own, and long caches of many layers fit on one device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...core.context import State
from ...layers.rotary import rotate
from ...models.blocks import Memory, Method, Pass, SelfAttention, attend_layer
from ...models.decoder_lm import DecoderLM

VOCABULARY = 512
Attend = Callable[[Pass, int, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(run, layer, x, q, k, v) → (B, H, 1, D)``."""


class _InPlace(SelfAttention):
    """Attention of one new token over a cache that is given from outside."""

    cache: tuple[Tensor, Tensor]
    attend: Attend

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """``(B, 1, dim)`` in and out."""
        sizes = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv(x).split(sizes, -1))
        turn = run.turn(self.head_dim, self.rope_base)
        keys, values = self.cache
        keys[:, :, -1:], values[:, :, -1:] = rotate(k, turn), v
        out = self.attend(run, self.layer_index, x, rotate(q, turn), keys, values)
        return self.out(out.transpose(1, 2).flatten(2))


class Decoding:
    """A decoder of random weights and full caches.

    Args:
        dim, depth, heads, kv_heads, ratio: of the model. batch: sequences. length: keys that a step sees, its own included.
        device, dtype: of everything. caches: how many, dealt to the layers in turn.
    """

    def __init__(
        self, dim: int, depth: int, heads: int, kv_heads: int, batch: int, length: int, device: str, dtype: torch.dtype,
        *, ratio: float = 2.0, caches: int = 2,
    ) -> None:  # fmt: skip
        model = DecoderLM(VOCABULARY, dim, depth, attention=lambda i: _InPlace(dim, heads, i, kv_heads), ratio=ratio)
        self.model, self.length = model.to(device, dtype).eval(), length
        make = torch.Generator(device).manual_seed(0)
        shape = (batch, kv_heads, length, dim // heads)
        self.caches = [
            tuple(torch.randn(shape, generator=make, device=device, dtype=dtype) for _ in range(2)) for _ in range(caches)
        ]  # fmt: skip
        self.q = torch.randn(batch, heads, 1, dim // heads, generator=make, device=device, dtype=dtype)
        self.x = torch.randn(batch, 1, dim, generator=make, device=device, dtype=dtype)
        self.ids = torch.randint(VOCABULARY, (batch, 1), generator=make, device=device)

    def states(self, policy: Method) -> dict[int, State]:
        """What the policy's patterns remember before the step: made by a step that sees one key less."""
        states: dict[int, State] = {}
        self._step(policy, states, self.length - 1, attend_layer)
        return states

    def step(
        self, policy: Method | None, states: dict[int, State] | None = None, attend: Attend = attend_layer
    ) -> Tensor:
        """``(B, 1, vocabulary)`` logits; ``states`` stays as it is, so that every call does the same work."""
        return self._step(policy, dict(states or {}), self.length, attend)

    def attention(
        self, policy: Method | None, states: dict[int, State] | None = None, *, measuring: bool = False
    ) -> Pass:
        """The attention of all layers alone, on the same queries."""
        run = self._begin(policy, dict(states or {}), self.length)
        run.measuring = measuring
        with torch.no_grad():
            for layer in range(len(self.model.layers)):
                attend_layer(run, layer, self.x, self.q, *self.cache(layer))
        return run

    def cache(self, layer: int) -> tuple[Tensor, Tensor]:
        """``(B, Hkv, N, D)`` keys and values that a layer reads."""
        keys, values = self.caches[layer % len(self.caches)]
        return keys, values

    def _begin(self, policy: Method | None, states: dict[int, State], length: int) -> Pass:
        before = self.cache(0)[0][:, :, : length - 1]
        run = self.model.begin(self.ids, policy, Memory({0: before}), states=states)
        run.memory = None
        return run

    @torch.no_grad()
    def _step(self, policy: Method | None, states: dict[int, State], length: int, attend: Attend) -> Tensor:
        run = self._begin(policy, states, length)
        for layer, block in enumerate(self.model.layers):
            keys, values = self.cache(layer)
            block.attention.cache = (keys[:, :, :length], values[:, :, :length])  # type: ignore[union-attr, assignment]
            block.attention.attend = attend  # type: ignore[union-attr, assignment]
        return self.model(self.ids, run=run)
