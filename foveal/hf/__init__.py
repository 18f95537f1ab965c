"""The Hugging Face door: attach a policy to an unmodified transformers model."""

from .forward import AttentionEvent
from .handle import Handle, attach
from .ranks import RankHandle, context_parallel

__all__ = ["AttentionEvent", "Handle", "RankHandle", "attach", "context_parallel"]
