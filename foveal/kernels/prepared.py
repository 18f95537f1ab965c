"""What a kernel prepares for a mask, made once: layers, steps and calls share masks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask
from torch.nn.parameter import Parameter

from .call import AttentionCall

T = TypeVar("T")
_kept: weakref.WeakKeyDictionary[BlockMask, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
"""For as long as the mask lives; what is kept must not hold the mask itself."""


def prepared(call: AttentionCall, mask: BlockMask | None, name: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """``make()``, or what it made before for this mask, name and base mask.

    Kept with the mask where it is one of foveal's own, whose tensors never change, and the base mask follows from lengths alone; else
    with ``call.base``, which remembers its last mask.
    """
    key = _key(call, mask)
    if mask is not None and key is not None:
        kept = _kept.setdefault(mask, {})
        if (name, key) not in kept:
            kept[name, key] = make()
        return kept[name, key]
    found = call.base.cache.get(name)
    if found is None or found[0] is not mask:
        call.base.cache[name] = found = (mask, make())
    return found[1]


def is_plain_tensor(x: Tensor) -> bool:
    """Whether what is made beside ``x`` holds numbers that may be kept: of a subclass, such as a fake tensor, it may not."""
    return type(x) in (Tensor, Parameter)


def _key(call: AttentionCall, mask: BlockMask | None) -> Hashable:
    """What the preparation follows from beside the mask's lists; None when it must not outlive the call's base mask."""
    if mask is None or torch.compiler.is_compiling() or not is_plain_tensor(call.q):
        return None
    mod, lengths = mask.mask_mod, call.base.key()
    if lengths is None or not (mod is noop_mask or getattr(mod, "__module__", "").startswith("foveal.")):
        return None
    return (
        lengths,
        mod,
        torch.is_inference_mode_enabled(),
    )  # what is made in inference mode cannot be saved for backward
