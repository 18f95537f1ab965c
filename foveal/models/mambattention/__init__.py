"""MambAttention (arXiv 2507.00966): single-channel speech enhancement on compressed spectrograms."""

from .codec import Codec
from .network import MambAttention

__all__ = ["Codec", "MambAttention"]
