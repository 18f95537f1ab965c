"""One attention call, validated, in the form that every implementation receives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.layouts import Layout


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Arguments of one call.

    Attributes:
        q: ``(B, H, Nq, D)``; k: ``(B, Hkv, Nk, D)``; v: ``(B, Hkv, Nk, Dv)``.
        layout: what is kept, None for everything; base: what the model itself allows. A pair is visible when both say so.
        scale: factor of q·k. softcap: logits become ``softcap·tanh(logits/softcap)``.
        bias: ``(H, 2R+1)`` table over the clipped relative distance ``clamp(key − query, −R, R) + R``, added after softcap.
        return_lse: whether the caller will read the log-sum-exp (some fast paths cannot give it).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    layout: Layout | None
    base: BaseMask
    scale: float
    softcap: float | None = None
    bias: Tensor | None = None
    return_lse: bool = True

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def needs_grad(self) -> bool:
        tensors = (self.q, self.k, self.v, self.bias)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def replace(self, **changes: Any) -> AttentionCall:
        return replace(self, **changes)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax and accumulation type for inputs of ``dtype``: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def relative_index(call: AttentionCall, q_index: Tensor, k_index: Tensor) -> Tensor:
    """Column of ``bias`` for row and key indices (broadcastable)."""
    assert call.bias is not None
    reach = (call.bias.shape[1] - 1) // 2
    return (k_index - (q_index + call.base.shift)).clamp(-reach, reach) + reach
