"""Layouts of static patterns, and what a kernel prepares for a mask: made once, because layers, steps and calls share them."""

from __future__ import annotations

import contextlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask
from torch.nn.parameter import Parameter

from ..core.base_mask import BaseMask
from ..core.context import SelectContext
from ..core.layouts import Layout
from .call import AttentionCall

T = TypeVar("T")
_kept: weakref.WeakKeyDictionary[BlockMask, dict[Hashable, tuple[list[Tensor], list[int], Any]]] = (
    weakref.WeakKeyDictionary()
)
"""The lists of a mask, their versions and what was made from them, as long as the mask lives; nothing in it may hold the mask."""
MOST = 4
"""Preparations of one mask: other kernels, other numbers of heads."""


def prepared(call: AttentionCall, mask: BlockMask | None, name: tuple[Hashable, ...], make: Callable[[], T]) -> T:
    """``make()``, or what it made before for this mask, name and base mask.

    Kept with the mask where its condition is one of foveal's own, whose tensors never change, and the base mask follows from lengths
    alone; else with ``call.base``, which remembers its last mask. Lists that were changed since are read again.
    """
    key = _key(call, mask)
    if mask is None or key is None:
        found = call.base.cache.get(name)
        if found is None or found[0] is not mask:
            call.base.cache[name] = found = (mask, make())
        return found[1]
    kept, lists = _kept.setdefault(mask, {}), _lists(mask)
    versions = [0 if x.is_inference() else x._version for x in lists]
    known = kept.get((name, key))
    if known is None or known[1] != versions or any(a is not b for a, b in zip(known[0], lists, strict=True)):
        kept.pop((name, key), None)
        while len(kept) >= MOST:
            kept.pop(next(iter(kept)), None)
        kept[name, key] = known = (lists, versions, make())
    return known[2]


def keeps(x: Tensor) -> bool:
    """Whether what is made beside ``x`` holds numbers that may be kept: of a subclass, such as a fake tensor, it may not."""
    return type(x) in (Tensor, Parameter)


def _key(call: AttentionCall, mask: BlockMask | None) -> Hashable:
    """What the preparation follows from beside the mask's lists; None when it must not outlive the call's base mask."""
    if mask is None or torch.compiler.is_compiling() or not (keeps(call.q) and keeps(call.base.lo)):
        return None
    mod, lengths = mask.mask_mod, call.base.key()
    told = mod is noop_mask and not any(x.is_inference() for x in _lists(mask))  # those have no versions
    if lengths is None or not (told or _ours(mod)):
        return None
    # what is made in inference mode cannot be saved for backward
    return lengths, mod, tuple(mask.seq_lengths), tuple(mask.BLOCK_SIZE), torch.is_inference_mode_enabled()


def _ours(mod: Any) -> bool:
    """Whether a condition was written here: a wrapper may borrow the name of its module, not its globals."""
    return str(getattr(mod, "__globals__", {}).get("__name__")).startswith("foveal.")


def _lists(mask: BlockMask) -> list[Tensor]:
    found = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    return [x for x in found if x is not None]


_static: OrderedDict[Hashable, Any] = OrderedDict()
"""Layouts of static patterns, the last ``MOST_STATIC`` that were asked for."""
MOST_STATIC = 8
_NOTHING = object()


def selected(pattern: Any, q: Tensor, k: Tensor, base: BaseMask, scale: float) -> Layout | None:
    """What a pattern selects without a state; a static one is asked once for every size."""
    ctx = SelectContext(base=base, scale=scale, q_offset=max(base.shift, 0))
    if not (_may_keep(pattern) and keeps(q) and keeps(base.lo)):
        return pattern.select(q, k, ctx, None)[0]
    key = (type(pattern), pattern, base.key(), q.shape[:2], k.shape[1], torch.is_inference_mode_enabled())
    found = _static.pop(key, _NOTHING)
    if found is _NOTHING:
        found = pattern.select(q, k, ctx, None)[0]
    _static[key] = found
    while len(_static) > MOST_STATIC:
        with contextlib.suppress(KeyError):  # another thread was faster
            _static.popitem(last=False)
    return found


def _may_keep(pattern: Any) -> bool:
    """Whether a pattern is static, never changes, and can be looked up by its value."""
    if not getattr(pattern, "static", False) or torch.compiler.is_compiling():
        return False
    if not getattr(getattr(type(pattern), "__dataclass_params__", None), "frozen", False):
        return False
    try:
        hash(pattern)
    except TypeError:
        return False
    return True
