"""Channel attention by name."""

from __future__ import annotations

import inspect
from typing import Any

from ...core.errors import ConfigError, nearest
from ...core.registry import entries, lookup
from .base import ChannelAttention


def channel_attention_names() -> list[str]:
    """All mechanisms that :func:`build_channel_attention` knows, sorted."""
    return list(entries("channel"))


def options_of(name: str) -> dict[str, Any]:
    """The options that a mechanism takes, with their defaults.

    Raises:
        ConfigError: no such mechanism; the message offers the nearest name.
    """
    signature = inspect.signature(lookup("channel", name).__init__)
    return {k: p.default for k, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def build_channel_attention(name: str, channels: int, **options: Any) -> ChannelAttention:
    """A mechanism by its name.

    Args:
        name: one of :func:`channel_attention_names`.
        channels: C of the input.
        options: words of the vocabulary in :mod:`foveal.layers.channel.base` that the mechanism takes.

    Raises:
        ConfigError: no such mechanism or option, with the nearest one that exists; an option out of range.
    """
    known = options_of(name)
    for word in options:
        if word not in known:
            taken = f"it takes {', '.join(known)}" if known else "it takes no options"
            hint = f" {nearest(word, known)}" if known else ""
            raise ConfigError(f"channel attention {name!r} has no option {word!r}: {taken}.{hint}")
    built: ChannelAttention = lookup("channel", name)(channels, **options)
    return built
