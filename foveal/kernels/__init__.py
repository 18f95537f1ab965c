"""How attention is computed: interchangeable implementations, all equal to ``reference`` within stated tolerances."""

from .dispatch import IMPLEMENTATIONS, Explanation, attention, explain
from .merge import merge

__all__ = ["IMPLEMENTATIONS", "Explanation", "attention", "explain", "merge"]
