"""MambAttention (arXiv 2507.00966): single-channel speech enhancement on compressed spectrograms."""

from .network import MambAttention

__all__ = ["MambAttention"]
