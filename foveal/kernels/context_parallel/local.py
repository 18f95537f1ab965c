"""Attention of one part of the keys on one rank: forward gives (out, lse), backward takes the *final* out and lse.

With the log-sum-exp over all keys, the weights of a part are ``exp(logits − lse)``: what each part adds to the gradients
is exact by itself, and nothing but ``out`` and ``lse`` has to be kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import ConfigError, UnsupportedError, nearest
from ..call import AttentionCall, compute_dtype
from ..dispatch import IMPLEMENTATIONS, compute, pick, refusals

Gradients = tuple[Tensor, Tensor, Tensor]


def check(impl: str, call: AttentionCall) -> None:
    """Raise unless ``impl`` is known and can run parts of ``call``."""
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ConfigError(f"impl={impl!r} is unknown. {nearest(impl, ['auto', *IMPLEMENTATIONS])}")
    reasons = [] if impl == "auto" else _sdpa_refusals(call) if impl == "sdpa" else refusals(impl, call)
    if reasons:
        raise UnsupportedError(f"impl={impl!r} cannot run this call over ranks: it {'; it '.join(reasons)}.")


def chosen(impl: str, call: AttentionCall) -> str:
    """The implementation that runs; ``auto`` picks one whose backward takes a given log-sum-exp."""
    if impl != "auto":
        return impl
    found = pick(call.replace(return_lse=True))
    return "gather" if found == "sdpa" else found


def forward(call: AttentionCall, impl: str) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` ``(B, H, Nq, Dv)`` and ``(B, H, Nq)``."""
    if impl == "sdpa":
        return _sdpa(call)
    out, lse = compute(call.replace(return_lse=True), impl)
    assert lse is not None
    return out, lse


def backward(
    call: AttentionCall, impl: str, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> Gradients:
    """What this part adds to the gradients of q, k and v.

    Args:
        call: the part. out, lse: final results of its rows, over all keys. grad_out, grad_lse: their gradients.
    """
    known = {
        "native": _native_backward,
        "gather": _gather_backward,
        "sdpa": _sdpa_backward,
        "reference": _plain_backward,
    }
    return known.get(impl, _recomputed)(call, impl, out, lse, grad_out, grad_lse)


def _native_backward(call: AttentionCall, impl: str, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:  # fmt: skip
    from ..native import _arguments
    from ..native.ops import attention_backward

    (q, k, v, *seen), _ = _arguments(call)
    lse = lse.float().contiguous()
    grads = attention_backward(grad_out, grad_lse, q, k, v, out.to(q.dtype).contiguous(), lse, *seen, False)
    return grads[0], grads[1], grads[2]


def _gather_backward(call: AttentionCall, impl: str, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:  # fmt: skip
    from ..block_plan import block_plan
    from ..gather import _budget, _flat, _pad, _scores
    from ..row_gradients import gradients

    plan = block_plan(call, None, _budget(call.q.device))
    extra = -lse.shape[2] % plan.q_unit
    dtype = compute_dtype(call.q.dtype)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    wide = [_flat(_pad(x, plan.q_unit)) for x in (call.q, out, grad_out)]
    lse, grad_lse = (
        torch.nn.functional.pad(x.to(dtype), (0, extra), value=fill).reshape(-1) for x, fill in ((lse, -torch.inf), (grad_lse, 0.0))
    )  # fmt: skip
    k, v = (_pad(x, plan.k_unit) for x in (call.k, call.v))
    dq, dk, dv, _ = gradients(wide[0], _flat(k), _flat(v), None, wide[1], lse, plan, _scores(call), wide[2], grad_lse)
    batch, heads, q_len = call.q.shape[:3]
    return (
        dq.view(batch, heads, -1, dq.shape[-1])[:, :, :q_len],
        dk.view(k.shape)[:, :, : call.k.shape[2]],
        dv.view(v.shape)[:, :, : call.v.shape[2]],
    )


def _plain_backward(call: AttentionCall, impl: str, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:  # fmt: skip
    """Written out in float64, the definition of the others."""
    from ..reference import visible_pairs

    q, k, v, out, grad_out, lse = (t.double() for t in (call.q, call.k, call.v, out, grad_out, lse))
    g = call.groups
    k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
    logits = (q @ k.transpose(-1, -2)) * call.scale
    slope: Tensor | float = 1.0
    if call.softcap is not None:
        tanh = torch.tanh(logits / call.softcap)
        logits, slope = call.softcap * tanh, 1 - tanh.square()
    p = torch.where(
        visible_pairs(call), torch.exp(logits - lse.masked_fill(lse == -torch.inf, torch.inf)[..., None]), 0.0
    )
    term = (grad_out * out).sum(-1) - (0.0 if grad_lse is None else grad_lse.double())
    ds = p * (grad_out @ v.transpose(-1, -2) - term[..., None]) * slope * call.scale
    dk, dv = ds.transpose(-1, -2) @ q, p.transpose(-1, -2) @ grad_out
    shape = call.k.shape
    dk, dv = (x.view(shape[0], shape[1], g, *x.shape[2:]).sum(2) for x in (dk, dv))
    return ds @ k, dk, dv


def _recomputed(call: AttentionCall, impl: str, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:  # fmt: skip
    """For implementations that keep their backward to themselves: run the part again and differentiate its merging.

    The part's output enters with weight ``exp(lse_part − lse)``; its log-sum-exp moves that weight.
    """
    q, k, v = (t.detach().requires_grad_() for t in (call.q, call.k, call.v))
    with torch.enable_grad():
        own_out, own_lse = forward(call.replace(q=q, k=k, v=v), impl)
    weight = torch.where(own_lse == -torch.inf, 0.0, torch.exp(own_lse - lse)).detach()
    term = (grad_out * (own_out.detach() - out)).sum(-1) + (0.0 if grad_lse is None else grad_lse)
    grads = torch.autograd.grad(
        (own_out, own_lse),
        (q, k, v),
        (grad_out * weight[..., None].to(grad_out.dtype), (weight * term).to(own_lse.dtype)),
    )
    return grads[0], grads[1], grads[2]


# --- torch's own kernel -------------------------------------------------------------------------------------------------


def _sdpa_refusals(call: AttentionCall) -> list[str]:
    reasons = []
    if call.q.device.type != "cpu":
        reasons.append("takes a given log-sum-exp in its backward on CPU only")
    if call.softcap is not None:
        reasons.append("has no softcap")
    if call.q.shape[-1] != call.v.shape[-1]:
        reasons.append("returns the log-sum-exp only when D equals Dv")
    if call.scale <= 0:
        reasons.append("needs a scale above 0")
    return reasons


def _sdpa_arguments(call: AttentionCall) -> tuple[Tensor, Tensor, bool, dict[str, Any]]:
    """Keys and values with heads repeated, whether a triangle is all the mask there is, and further arguments."""
    k, v = (t.repeat_interleave(call.groups, 1) for t in (call.k, call.v))
    extra: dict[str, Any] = {"scale": call.scale}
    base = call.base
    causal = base.plain and base.causal and base.shift == 0
    if not causal and not (base.plain and not base.causal):
        seen = base.dense(call.q.shape[0])[:, None]
        extra["attn_mask"] = torch.zeros(seen.shape, dtype=call.q.dtype).masked_fill(~seen, -torch.inf)
    return k, v, causal, extra


def _sdpa(call: AttentionCall) -> tuple[Tensor, Tensor]:
    k, v, causal, extra = _sdpa_arguments(call)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(call.q, k, v, 0.0, causal, **extra)
    mask = extra.get("attn_mask")
    if mask is not None:  # a row that sees nothing gets 0 here, which is no log-sum-exp
        blind = (mask == -torch.inf).all(-1)
        lse = lse.masked_fill(blind, -torch.inf)
        out = out.masked_fill(blind[..., None], 0.0)
    return out, lse


def _sdpa_backward(call: AttentionCall, impl: str, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:  # fmt: skip
    if grad_lse is not None:
        raise UnsupportedError("impl='sdpa' has no gradient through the log-sum-exp. Use impl='gather' or 'native'.")
    k, v, causal, extra = _sdpa_arguments(call)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out.contiguous(), call.q, k, v, out.to(call.q.dtype).contiguous(), lse.contiguous(), 0.0, causal, **extra
    )
    shape = call.k.shape
    dk, dv = (x.reshape(shape[0], shape[1], call.groups, *x.shape[2:]).sum(2) for x in (dk, dv))
    return dq, dk, dv
