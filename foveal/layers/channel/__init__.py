"""Channel attention: one file per mechanism, one vocabulary of options, and a way into a user's own network."""

from .base import ChannelAttention
from .build import build_channel_attention, channel_attention_names
from .insert import Inserted, channel_gates, insert_channel_attention, remove_channel_attention

__all__ = [
    "ChannelAttention",
    "Inserted",
    "build_channel_attention",
    "channel_attention_names",
    "channel_gates",
    "insert_channel_attention",
    "remove_channel_attention",
]
