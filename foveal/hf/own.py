"""Run a model with an attention function of the caller's own for the length of a block.

For instruments that must change what an attention layer computes (patching, steering) rather than choose its pairs. Tensors, mask,
scale, softcap and learned sinks arrive as in :func:`foveal.attach`; what foveal cannot honour is refused by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import UnsupportedError
from ..kernels.call import AttentionCall
from . import families, interface
from .families import AttentionSite
from .forward import _scale, refuse_unhonoured
from .masks import HostMask, base_from_tensor, mask_function_for_host

NAME = "foveal_own"

Compute = Callable[[AttentionSite, AttentionCall, "Tensor | None"], Tensor]
"""``(site, call, sink logits (H,) or None) → (B, H, Nq, Dv)``."""

_active: weakref.WeakKeyDictionary[nn.Module, list[tuple[AttentionSite, Compute]]] = weakref.WeakKeyDictionary()


@contextmanager
def own_attention(model: nn.Module, compute: Compute) -> Iterator[list[AttentionSite]]:
    """Let ``compute`` be the model's self-attention inside the block; afterwards the model is as before, also after an exception.

    Args:
        model: a decoder that :func:`foveal.attach` takes, without cross-attention.
        compute: the attention.

    Yields:
        The attention sites in the order of the layers.

    Raises:
        UnsupportedError: another family, layers that share a module, or a policy attached at the same time.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    found = decoder_sites(model)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, mask_function_for_host(lambda: None))
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    configs: list[Any] = families.configs([s.module for s in found], owners)
    before = [config._attn_implementation for config in configs]
    for site in found:
        _active.setdefault(site.module, []).append((site, compute))
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield found
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        for site in found:
            _active[site.module].pop()


def decoder_sites(model: nn.Module) -> list[AttentionSite]:
    """The self-attention layers of a decoder, refusing models whose layers an instrument could not tell apart.

    Raises:
        UnsupportedError: naming the model and the reason.
    """
    name = type(model).__name__
    found = families.sites(model)
    if any(site.index < 0 for site in found):
        raise UnsupportedError(f"{name} has cross-attention; expected a decoder-only language model.")
    if families.depth(model, found) != len(found):
        raise UnsupportedError(
            f"{name} shares one attention module between layers; expected a decoder with its own module per layer."
        )
    if any(interface.attached(site.module) for site in found):
        raise UnsupportedError(f"a policy is attached to {name}; leave its `with foveal.attach(...)` block first.")
    return found


@torch.compiler.disable
def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    stack = _active.get(module)
    if not stack:
        raise UnsupportedError(
            f"{type(module).__name__} runs outside the block that changed its attention; it shares a config with a model that is being "
            "changed. Copy one of the two models first."
        )
    site, compute = stack[-1]
    refuse_unhonoured(module, dropout, kwargs)
    q_len, kv_len = query.shape[2], key.shape[2]
    if isinstance(attention_mask, HostMask):
        base = attention_mask.base
    elif isinstance(attention_mask, Tensor):
        base = base_from_tensor(attention_mask, q_len, kv_len, kv_len - q_len)
    else:
        base = BaseMask.build(q_len, kv_len, causal=True, device=query.device)
    base = base.to(query.device)
    if base.causal and kv_len > base.shift + q_len:  # a static cache is longer than what has been written
        end = base.shift + q_len
        base, key, value = base.crop_keys(end), key[:, :, :end], value[:, :, :end]
    scale = _scale(module, query.shape[-1]) if scaling is None else scaling
    call = AttentionCall(query, key, value, None, base, float(scale), kwargs.get("softcap"))
    return compute(site, call, kwargs.get("s_aux")).transpose(1, 2).contiguous(), None
