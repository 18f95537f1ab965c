"""foveal: published attention systems under one interface, measured on your model, text and machine.

>>> import torch, foveal
>>> q = k = v = torch.randn(1, 8, 1024, 64)
>>> out = foveal.attention(q, k, v, foveal.patterns.SlidingWindow(window=256, sinks=4), causal=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "attention": "foveal.kernels",
    "explain": "foveal.kernels",
    "merge": "foveal.kernels",
    "attach": "foveal.hf",
    "context_parallel": "foveal.hf",
    "context_parallel_attention": "foveal.kernels.context_parallel",
    "Policy": "foveal.policies",
    "FovealError": "foveal.core.errors",
}
_MODULES = {
    "bench", "core", "data", "hf", "kernels", "layers", "lens", "models", "papers", "patterns", "policies", "recipes", "steer", "tune",
}  # fmt: skip

__all__ = [
    "FovealError",
    "Policy",
    "__version__",
    "attach",
    "attention",
    "context_parallel",
    "context_parallel_attention",
    "explain",
    "merge",
]

if TYPE_CHECKING:
    from .core.errors import FovealError
    from .hf import attach, context_parallel
    from .kernels import attention, explain, merge
    from .kernels.context_parallel import context_parallel_attention
    from .policies import Policy


def __getattr__(name: str) -> Any:
    """Import on first use, so that ``foveal info`` and ``foveal papers`` work without torch being loaded."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"foveal.{name}")
    raise AttributeError(f"module 'foveal' has no attribute {name!r}")
