"""Which modules of a model compute attention through transformers' interface, and which models are refused by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.errors import UnsupportedError


@dataclass(frozen=True)
class AttentionSite:
    """One attention module.

    Attributes:
        name: its path in the model.
        module: the module that transformers passes to the attention function.
        index: number of the self-attention layer, counted in the model's own order; −1 for cross-attention.
    """

    name: str
    module: nn.Module
    index: int


@functools.cache
def _uses_interface(cls: type) -> bool:
    """Whether the class itself calls transformers' attention interface."""
    try:
        return "attention_interface(" in inspect.getsource(cls)
    except (OSError, TypeError):
        return False


@functools.cache
def _takes_position_bias(cls: type) -> bool:
    try:
        return "position_bias" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    except (ValueError, TypeError):
        return False


def is_cross(name: str, module: nn.Module) -> bool:
    """Whether the module attends from one sequence to another."""
    last = name.rsplit(".", 1)[-1].lower()
    path = name.lower()
    return (
        bool(getattr(module, "is_cross_attention", False))
        or "cross" in path
        or last == "encoder_attn"
        or ".encoder_attn." in path
    )


def sites(model: nn.Module) -> list[AttentionSite]:
    """All attention modules of the model in its own order.

    Raises:
        UnsupportedError: naming the model class and the reason, when its attention cannot be reached or honoured.
    """
    from transformers import PreTrainedModel

    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(
            f"model is a {name}; expected a transformers PreTrainedModel. For other models use foveal.attention or foveal.layers."
        )
    found, index = [], 0
    text = _text_config(model)
    for path, module in model.named_modules():
        if not _uses_interface(type(module)):  # type: ignore[arg-type]
            continue
        if text is not None and getattr(module, "config", None) is not text:
            continue
        if _takes_position_bias(type(module)):  # type: ignore[arg-type]
            raise UnsupportedError(
                f"{name} is not supported: its {type(module).__name__} adds a learned position bias as an N×N tensor (position_bias), "
                "which foveal does not honour. Run this model without foveal."
            )
        cross = is_cross(path, module)
        found.append(AttentionSite(path, module, -1 if cross else index))
        index += not cross
    if not found:
        reason = "it has no attention" if not any("Attention" in type(m).__name__ for m in model.modules()) else "its attention does not go through transformers' attention interface"  # fmt: skip
        raise UnsupportedError(f"{name} is not supported: {reason}. Run this model without foveal.")
    return found


def _text_config(model: nn.Module) -> object | None:
    """The text stack's config in a model that also has other towers, else None."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return text if text is not config and hasattr(config, "text_config") else None


def depth(model: nn.Module, found: list[AttentionSite]) -> int:
    """Number of self-attention layers, also where layers share one module (ALBERT)."""
    own = sum(s.index >= 0 for s in found)
    config: Any = model.config
    if isinstance(getattr(config, "num_hidden_groups", None), int):
        return config.num_hidden_layers * config.inner_group_num
    return own


def configs(modules: Iterable[nn.Module], owners: Iterable[Any]) -> list[Any]:
    """The configs that steer these attention modules and their masks: their own, and those of the models that hold them.

    A config with sub-configs of its own (vision-language models, encoder-decoder pairs) steers other towers too and is left
    alone unless an attention module reads it directly.
    """
    found = set(modules)
    used = {id(m.config): m.config for m in found if getattr(m, "config", None) is not None}
    for owner in owners:
        if not getattr(owner.config, "sub_configs", None) and any(m in found for m in owner.modules()):
            used[id(owner.config)] = owner.config
    return list(used.values())
