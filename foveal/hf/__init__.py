"""The Hugging Face door: attach a policy to an unmodified transformers model."""

from .forward import AttentionEvent
from .handle import Handle, attach

__all__ = ["AttentionEvent", "Handle", "attach"]
