"""What patterns remember for each request, keyed weakly by the request's key-value cache."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.context import State


@dataclass
class _Entry:
    state: State
    seen: int
    keys: weakref.ref[Tensor]
    version: int


class RequestStates:
    """State per (cache, layer, head span).

    The attention function never sees the cache change hands: beam search reorders it, assisted decoding crops it. So every
    entry remembers which key tensor it belongs to, and how long it was; when either no longer matches, the state is gone
    and the pattern rebuilds it from the keys, unless the pattern keeps something (``Pattern.after_move``). For caches that do not show their key tensors nothing is remembered.
    """

    def __init__(self) -> None:
        self._store: weakref.WeakKeyDictionary[Any, dict[tuple[int, int], _Entry]] = weakref.WeakKeyDictionary()

    def get(
        self, cache: Any, slot: tuple[int, int], q_offset: int, keys_before: tuple[Tensor, int] | None,
        after_move: Callable[[State, bool], State] = lambda *_: None,
    ) -> State:  # fmt: skip
        """The state to go on with, or None when there is none or it no longer fits.

        Args:
            cache: the request's cache, or None.
            slot: (layer, first head of the span).
            q_offset: tokens that the cache held before this call.
            keys_before: the cache layer's key tensor and its version, read before this call updated it.
            after_move: called with the state when the cache changed, and with whether its rows may have been reordered
                rather than cropped.
        """
        if cache is None or keys_before is None:
            return None
        entry = self._store.get(cache, {}).get(slot)
        if entry is None:
            return None
        if entry.seen != q_offset:
            return after_move(entry.state, False)
        tensor, version = keys_before
        same = entry.keys() is tensor and (version < 0 or version == entry.version)
        return entry.state if same else after_move(entry.state, True)

    def put(
        self, cache: Any, slot: tuple[int, int], state: State, seen: int, keys_now: tuple[Tensor, int] | None
    ) -> None:
        """Remember what ``select`` returned; ``seen`` counts the tokens in the cache now."""
        if cache is None or state is None or keys_now is None:
            return
        tensor, version = keys_now
        self._store.setdefault(cache, {})[slot] = _Entry(state, seen, weakref.ref(tensor), version)


def cache_keys(cache: Any, layer: int | None) -> tuple[Tensor, int] | None:
    """The key tensor that a cache holds for a layer, with its modification count (−1 where PyTorch keeps none)."""
    layers = getattr(cache, "layers", None)
    if layers is None or layer is None or layer >= len(layers):
        return None
    keys = getattr(layers[layer], "keys", None)
    if not isinstance(keys, Tensor):
        return None
    return keys, -1 if keys.is_inference() else keys._version
