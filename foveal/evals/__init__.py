"""Long-context evidence: what a model still does far from the beginning, under its own attention and under policies."""

from .options import EvalOptions
from .run import run_eval

__all__ = ["EvalOptions", "run_eval"]
