"""Linear attention's product in C++, as a ``torch.library`` operator; its gradient is the same product with exchanged roles.

``foveal.kernels.linear_chunks`` says which, and is the torch form of all this. Here the divisor belongs to the product: one pass
makes ``q·Σ k + eps`` beside ``q·Σ k vᵀ`` and divides. In its gradient the column of ones that a divisor stands for, and the
gradient of the divisor, are one more feature of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.errors import UnsupportedError
from . import TYPES, _native

_LIBRARY = torch.library.Library("foveal", "FRAGMENT")
_LIBRARY.define(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? q_extra, Tensor? k_extra, Tensor start, Tensor? cu, bool causal, "
    "bool reverse, bool normalise, float eps) -> (Tensor, Tensor, Tensor)"
)
_product = torch.ops.foveal.linear_attention.default


def product(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, *, cu: Tensor | None, causal: bool, normalise: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Every row meets ``start`` and the keys: all of them, or (causal) those up to its own.

    Args:
        q: ``(B, Hkv, G, Nq, F)``. k: ``(B, Hkv, 1, Nk, F)``. v: ``(B, Hkv, 1, Nk, D)``; any strides, float32 or half precision.
        start: ``(B, Hkv, F, D)`` float32, with Σ k as a last column when ``normalise``; W in the place of B with ``cu``.
        cu: ``(W + 1,)`` int64, for W sets one after the other in B = 1 row; None for none.
        normalise: divide by q·Σ k + ``eps``; zeros where that is 0.

    Returns:
        ``(B, Hkv, G, Nq, D)`` float32, and the state after all keys, like ``start``.
    """
    out, _, end = _product(q, k, v, None, None, start, cu, causal, False, normalise, eps)
    return out, end


def _empty(q: Tensor, v: Tensor, start: Tensor, cu: Tensor | None, normalise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten out, divisor and end; with sets, a row's heads lie side by side, as they came."""
    b, heads, groups, n, _ = q.shape
    shape, order = ((b, n, heads, groups), (0, 2, 3, 1)) if cu is not None else ((b, heads, groups, n), (0, 1, 2, 3))
    out = torch.empty(*shape, v.shape[-1], dtype=torch.float32, device=q.device).permute(*order, 4)
    divisor = torch.empty(shape if normalise else (0, 0, 0, 0), dtype=torch.float32, device=q.device).permute(order)
    return out, divisor, torch.empty(start.shape, dtype=torch.float32, device=q.device)


def _typed(x: Tensor) -> tuple[int, int, tuple[int, ...]]:
    return x.data_ptr(), TYPES.index(x.dtype), x.stride()


def _strided(x: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    return None if x is None else (x.data_ptr(), x.stride())


def _forward(
    q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor | None, k_extra: Tensor | None, start: Tensor, cu: Tensor | None,
    causal: bool, reverse: bool, normalise: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out, divisor, end = _empty(q, v, start, cu, normalise)
    _native.linear(
        (*start.shape[:2], q.shape[2], k.shape[2], q.shape[3], k.shape[3], q.shape[4], v.shape[4]),
        _typed(q), _typed(k), _typed(v), _strided(q_extra), _strided(k_extra),
        (start.data_ptr(), start.stride()), 0 if cu is None else cu.data_ptr(), (out.data_ptr(), out.stride()[:4]),
        (divisor.data_ptr(), divisor.stride()) if normalise else None, end.data_ptr(), eps, causal, reverse,
        torch.get_num_threads(),
    )  # fmt: skip
    return out, divisor, end


_LIBRARY.impl("linear_attention", _forward, "CPU")


@torch.library.register_fake("foveal::linear_attention")
def _(
    q: Tensor, k: Tensor, v: Tensor, q_extra: Tensor | None, k_extra: Tensor | None, start: Tensor, cu: Tensor | None,
    causal: bool, reverse: bool, normalise: bool, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(q, v, start, cu, normalise)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, q_extra, _, start, cu, *ctx.numbers = inputs
    out, divisor, _ = output
    ctx.extra = q_extra is not None
    normalise = ctx.numbers[2]
    ctx.save_for_backward(q, k, v, start, cu, *((out, divisor) if normalise else ()))
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, _: Tensor | None, dend: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, start, cu, *kept = ctx.saved_tensors
    causal, reverse, normalise, _eps = ctx.numbers
    if ctx.extra or (normalise and torch.is_grad_enabled()):
        raise UnsupportedError(
            "linear attention in C++ has no second derivative. Use impl='reference' where one is needed."
        )
    nothing = (None,) * len(ctx.numbers)
    if dout is None and dend is None:
        return (None,) * 7 + nothing
    dout = q.new_zeros(()).expand(*q.shape[:4], v.shape[-1]) if dout is None else dout
    dend = start.new_zeros(()).expand(start.shape) if dend is None else dend
    ones = extra = None
    if normalise:
        out, divisor = kept
        blind = divisor == 0
        dout = dout * divisor.masked_fill(blind, 1.0).reciprocal().masked_fill(blind, 0.0)[..., None]
        extra = -(dout * out).sum(-1)
        ones = dout.new_ones(()).expand(*v.shape[:-1])
    dq = dk = dv = dstart = None
    need_q, need_k, need_v, _, _, need_start, *_ = ctx.needs_input_grad
    if need_q:
        dq, _, _ = _product(dout, v, k, extra, ones, start.mT, cu, causal, reverse, False, 0.0)
    if need_k or need_start:
        dk, _, end = _product(v, dout, q, ones, extra, dend.mT, cu, causal, not reverse, False, 0.0)
        dstart = end.mT
    if need_v:
        dv, _, _ = _product(k, q, dout, None, None, dend[..., : v.shape[-1]], cu, causal, not reverse, False, 0.0)
    return (
        None if dq is None else dq.to(q.dtype),
        dk.to(k.dtype) if dk is not None and need_k else None,
        None if dv is None else dv.to(v.dtype),
        None, None, dstart if need_start else None, None, *nothing,
    )  # fmt: skip


torch.library.register_autograd("foveal::linear_attention", _differentiate, setup_context=_save, lib=_LIBRARY)
