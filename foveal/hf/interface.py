"""What transformers calls under the name ``"foveal"``, and who is attached to what."""

from __future__ import annotations

import sys
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import UnsupportedError
from .forward import attend
from .masks import NAME, HostMask, mask_function_for_host

if TYPE_CHECKING:
    from .handle import Handle

stacks: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[Handle]]] = weakref.WeakKeyDictionary()
"""The handles on each attention module, the innermost last."""

_configs: dict[int, tuple[Any, str, int]] = {}  # id → (config, implementation before foveal, users)
_thread = threading.local()


def running() -> list[Handle]:
    """Handles whose models are in a forward in this thread, the innermost last."""
    if not hasattr(_thread, "running"):
        _thread.running = []
    return _thread.running


def attached(module: nn.Module) -> list[Handle]:
    """The handles on an attention module, the innermost last."""
    return [handle for ref in stacks.get(module, []) if (handle := ref()) is not None]


def register() -> None:
    """Tell transformers foveal's attention and mask function; nothing is registered before the first ``attach``."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, foveal_attention)
    AttentionMaskInterface.register(NAME, mask_function_for_host(lambda: next(reversed(running()), None)))


def switch(config: Any) -> None:
    """Let a config name foveal's attention, as ``set_attn_implementation`` would, but for this config alone."""
    _, original, users = _configs.get(id(config), (config, config._attn_implementation, 0))
    _configs[id(config)] = (config, original, users + 1)
    config._attn_implementation_internal = NAME


def restore(config: Any) -> None:
    """Undo one :func:`switch`; the last one gives the config its own attention back."""
    _, original, users = _configs.pop(id(config))
    if users > 1:
        _configs[id(config)] = (config, original, users - 1)
    else:
        config._attn_implementation_internal = original


@torch.compiler.disable
def foveal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, None] | Any:  # fmt: skip
    """The attention function registered in transformers; modules that nobody attached to run their original attention."""
    handles = attached(module)
    if handles:
        return attend(handles[-1], module, query, key, value, attention_mask, dropout, scaling, is_causal, kwargs), None
    known = _configs.get(id(getattr(module, "config", None)))
    if known is None:
        raise UnsupportedError(
            f"{type(module).__name__} runs foveal's attention but no foveal.attach(...) is active for it; "
            "attach to the model that holds it. Copy a model before attaching to it."
        )
    kwargs |= {"dropout": dropout, "scaling": scaling} | ({} if is_causal is None else {"is_causal": is_causal})
    return _original_forward(module, known[1], query, key, value, attention_mask, kwargs)


def host_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Tensor:
    """``(B, Nq, H, Dv)`` of the attention that a module would have run without foveal, for handles that only look on."""
    out, _ = _original_forward(module, _configs[id(module.config)][1], query, key, value, mask, kwargs)
    return out


def _original_forward(
    module: nn.Module, name: str, query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Any:
    """The attention that the module would have run without foveal (another model that shares the config)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if isinstance(mask, HostMask):
        memo = ("rebuilt", name)  # all layers of a forward share the mask
        if memo not in mask.base.cache:
            mask.base.cache[memo] = mask.rebuild(name)
        mask = mask.base.cache[memo]
    if name == "eager":
        function = sys.modules[type(module).__module__].eager_attention_forward  # type: ignore[attr-defined]
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    return function(module, query, key, value, mask, **kwargs)
