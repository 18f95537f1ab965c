"""Dense attention by PyTorch's own ``scaled_dot_product_attention``, where it needs no N×N mask."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import AttentionCall


def refusals(call: AttentionCall) -> list[str]:
    """Reasons why SDPA cannot run the call without materialising a mask."""
    reasons = []
    base = call.base
    if call.layout is not None:
        reasons.append("runs dense attention only; the call has a sparse layout")
    if call.softcap is not None:
        reasons.append("has no softcap")
    if call.bias is not None:
        reasons.append("would need the relative-position bias as an N×N tensor")
    if not base.plain or (base.causal and not _square(call) and base.q_len != 1):
        reasons.append(
            "would need the mask (padding, window, documents, or a causal chunk after a cache) as an N×N tensor"
        )
    if call.scale <= 0 and base.causal:
        reasons.append("gives NaN for a causal mask with a scale of 0 or below")
    if call.return_lse:
        if call.q.device.type != "cpu":
            reasons.append("does not return the log-sum-exp on this device")
        elif call.needs_grad:
            reasons.append("has no gradient through the log-sum-exp")
        elif call.q.shape[-1] != call.v.shape[-1]:
            reasons.append("returns the log-sum-exp only when D equals Dv")
        elif call.q.numel() == 0 or call.k.numel() == 0:
            reasons.append("returns the log-sum-exp only where there are rows and keys")
    return reasons


def _square(call: AttentionCall) -> bool:
    return call.base.shift == 0


def attend(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """``(out, lse or None)``."""
    base = call.base
    k, v = call.k, call.v
    causal = base.causal and base.q_len > 1
    if base.causal:
        end = min(base.kv_len, base.shift + base.q_len)  # a static cache is longer than what has been written
        k, v = k[:, :, :end], v[:, :, :end]
    if call.return_lse:
        k, v = k.repeat_interleave(call.groups, 1), v.repeat_interleave(call.groups, 1)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(call.q, k, v, 0.0, causal, scale=call.scale)
    out = torch.nn.functional.scaled_dot_product_attention(
        call.q, k, v, is_causal=causal, scale=call.scale, enable_gqa=call.groups > 1
    )
    return out.to(call.q.dtype), None  # autocast may have lowered it
