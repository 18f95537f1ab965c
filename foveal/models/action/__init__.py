"""Finding actions in untrimmed video: BMN (arXiv 1907.09702), which takes an attention between its encoder and its heads."""

from .attention import ActionAttention
from .network import BMN, Maps

__all__ = ["BMN", "ActionAttention", "Maps"]
