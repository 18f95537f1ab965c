"""A dynamic cache that grows in place: transformers' own copies all keys and values of a layer for every new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

SPARE = 8
"""A full layer grows by one part in so many of its length, and by ``LEAST`` tokens at least."""
LEAST = 256


class GrowingLayer(DynamicLayer):
    """One layer: ``keys`` and ``values`` are views of larger buffers, and new tokens are written behind them.

    Cropping, reordering and whatever else replaces ``keys`` and ``values`` works as in the parent; the next update then goes on
    from what is there, in a new buffer if need be. With gradients it is the parent: what backward needs is never overwritten.
    Tensors that a caller took from the cache before a crop see what is written later.
    """

    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values ``(B, Hkv, n, D)`` with the new ones ``(B, Hkv, m, D)`` behind them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            self._buffers = None
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, new = self.get_seq_length(), key_states.shape[-2]
        buffers = self._fitting(before, before + new, (key_states, value_states))
        found = []
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[..., before : before + new, :].copy_(states)
            found.append(buffer[..., : before + new, :])
        self._buffers = buffers
        self.keys, self.values = found
        return self.keys, self.values

    def _fitting(self, before: int, after: int, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Buffers with room for ``after`` tokens that hold the first ``before``."""
        assert self.keys is not None and self.values is not None
        held = (self.keys, self.values)
        if (
            self._buffers is not None
            and before
            and all(
                buffer.shape[-2] >= after
                and now.data_ptr() == buffer.data_ptr()
                and now.stride() == buffer.stride()
                and now.shape[:-2] == buffer.shape[:-2] == new.shape[:-2]
                and (torch.is_inference_mode_enabled() or not buffer.is_inference())
                for buffer, now, new in zip(self._buffers, held, states, strict=True)
            )
        ):
            return self._buffers
        room = after + max(after // SPARE, LEAST)
        made = []
        for now, new in zip(held, states, strict=True):
            buffer = new.new_empty(*new.shape[:-2], room, new.shape[-1])
            if before:
                buffer[..., :before, :].copy_(now)
            made.append(buffer)
        return made[0], made[1]

    def reset(self) -> None:
        """Forget everything."""
        self._buffers = None
        super().reset()


def growing_cache(model: Any) -> DynamicCache | None:
    """An empty cache for a transformers model, to pass as ``past_key_values``; sliding-window layers stay transformers' own.

    None for a model that needs a cache of another kind, which it then makes itself.
    """
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        return None
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
