"""Logits of a few rows against a range of keys, the one place where the lens holds scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.call import AttentionCall, compute_dtype, relative_index

CPU_SCORES = 1 << 20
GPU_SCORES = 1 << 26
LOWEST = -1e30
"""Logit of a hidden pair: its weight is exactly 0 and, unlike −inf, 0 times it is 0."""


def budget(device: torch.device) -> int:
    """Scores of one chunk of rows, all heads together (a single row may need more)."""
    return CPU_SCORES if device.type == "cpu" else GPU_SCORES


def logits(call: AttentionCall, b: int, index: Tensor, keys: slice, seen: Tensor, hidden: float = LOWEST) -> Tensor:
    """Logits of sequence ``b``'s rows ``index`` ``(R,)`` on ``keys`` in the compute dtype: ``(H, R, keys)``.

    ``seen`` ``(R, keys)`` says which pairs are visible; the others get ``hidden``.
    """
    heads, kv_heads = call.q.shape[1], call.k.shape[1]
    dtype = compute_dtype(call.q.dtype)
    q = call.q[b][:, index].to(dtype) * call.scale
    k = call.k[b, :, keys].to(dtype)
    s = torch.bmm(q.reshape(kv_heads, -1, q.shape[-1]), k.transpose(1, 2)).view(heads, index.numel(), -1)
    if call.softcap is not None:
        s.div_(call.softcap).tanh_().mul_(call.softcap)
    if call.bias is not None:
        position = torch.arange(keys.start, keys.stop, device=s.device)
        s += call.bias[:, relative_index(call, index[:, None], position[None])].to(dtype)
    return s.masked_fill_(~seen, hidden)
