"""Kernelized attention whose weights carry a Toeplitz factor: ``w_ij = c_{j−i} φ(q_i)·φ(k_j)`` (arXiv 2106.12566, Algorithm 1).

Numerator and divisor are Toeplitz products of ``φ(k_j) v_jᵀ`` and ``φ(k_j)``, contracted with φ(q_i): O(n log n). The outer
products are made for a few features at a time and again in backward, so memory stays O(n) per head. With ``y`` the gradient of
the sums, ``T`` the product and ``Tᵀ`` its adjoint: ``dφ(q) = T(φ(k) vᵀ)·y``, ``dφ(k) = Tᵀ(φ(q) yᵀ)·v``, ``dv = Tᵀ(φ(q) yᵀ)ᵀ·φ(k)``
and ``dc`` is the correlation of ``φ(q) yᵀ`` with ``φ(k) vᵀ``: four transforms per feature and value column.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.errors import ShapeError
from .call import compute_dtype
from .linear import check, with_ones
from .pooling import full_precision
from .toeplitz import (
    BUFFER,
    DENSE_BUFFER,
    Precision,
    check_table,
    choose,
    spectrum,
    table_of,
    transform_length,
    visible,
)


def toeplitz_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, *, causal: bool = False, eps: float = 0.0
) -> Tensor:
    """The definition, with all pairs at once, in float64. Arguments as :func:`toeplitz_attention`."""
    q_len, k_len = q.shape[-2], k.shape[-2]
    weights = visible(c, q_len, causal).double().unfold(-1, k_len, 1).flip(-2) * (q.double() @ k.double().mT)
    return weights @ v.double() / away_from_zero(weights.sum(-1, keepdim=True), eps)


def toeplitz_attention(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, *, causal: bool = False, eps: float = 0.0, precision: Precision = "auto"
) -> Tensor:  # fmt: skip
    """``out_i = Σ_j c_{j−i} (q_i·k_j) v_j / Σ_j c_{j−i} (q_i·k_j)``.

    Args:
        q: ``(B, H, Nq, m)`` mapped queries. k: ``(B, H, Nk, m)`` mapped keys. v: ``(B, H, Nk, Dv)``.
        c: ``(H or 1, Nq + Nk − 1)`` table as in ``foveal.kernels.toeplitz``; scaling it changes nothing.
        causal: rows see offsets up to Nk − Nq. Rounding of the FFT (never the exact sum) reaches earlier rows.
        eps: least size of a divisor over the largest of its head, for features whose products can be negative; smaller ones are
            set to it. A row whose divisor is 0 gives zeros.
        precision: see :func:`foveal.kernels.toeplitz.toeplitz_matmul`.

    Returns:
        ``(B, H, Nq, Dv)`` in v's dtype; gradients flow to all four tensors.

    Raises:
        ShapeError: shapes that do not fit. ConfigError: an unknown precision.
    """
    check(q, k, v, "fast", 1)
    q_len = q.shape[-2]
    if (
        q.dim() != 4
        or q.shape[:2] != k.shape[:2]
        or check_table(c, k.shape[-2]) != q_len
        or c.shape[0] not in (1, q.shape[1])
    ):
        raise ShapeError(
            f"q, k, c have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(c.shape)}; expected (B, H, Nq, m), (B, H, Nk, m), (H or 1, Nq + Nk − 1)."
        )
    table = visible(c, q_len, causal)
    chosen = choose(table, q_len, precision, v.dtype)
    dtype = torch.float64 if chosen == "float64" else compute_dtype(v.dtype) if chosen == "dense" else torch.float32
    parts = [x.to(dtype) for x in (q, k, with_ones(v, True), table)]
    with full_precision(v):
        sums = _dense(*parts) if chosen == "dense" else _Weighted.apply(*parts)
        out = sums[..., :-1] / away_from_zero(sums[..., -1:], eps)
    return out.to(v.dtype)


def away_from_zero(divisor: Tensor, eps: float) -> Tensor:
    """Divisors ``(B, H, N, 1)`` of size ``eps`` times their head's largest at least, with their signs; 0 becomes 1, for rows of zeros."""
    least = eps * divisor.detach().abs().amax(-2, keepdim=True)
    least = torch.where(least > 0, least, torch.ones_like(least)) if eps else torch.ones_like(least)
    small = divisor.abs() < least if eps else divisor == 0
    return torch.where(small, torch.where(divisor < 0, -least, least), divisor)


def _dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """All pairs of a block of rows at a time."""
    q_len, k_len = q.shape[-2], k.shape[-2]
    lanes = table.unfold(-1, k_len, 1)  # row Nq − 1 first
    step = max(1, DENSE_BUFFER // max(1, q[..., :1, :1].numel() * k_len))
    parts = []
    for start in range(0, q_len, step):
        end = min(start + step, q_len)
        parts.append((q[..., start:end, :] @ k.mT * lanes[:, q_len - end : q_len - start].flip(-2)) @ v)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, table)
        qt, kt, vt = (x.mT.contiguous() for x in (q, k, v))
        q_len, length = q.shape[-2], transform_length(table.shape[1])
        kernel = spectrum(table, q_len, length)[:, None, None]
        out = torch.zeros_like(qt[:, :, :1]).expand(-1, -1, vt.shape[2], -1).contiguous()
        for r in _features(kt, vt, length):
            mixed = torch.fft.irfft(torch.fft.rfft(_outer(kt[:, :, r], vt), length) * kernel, length)[..., :q_len]
            out += torch.einsum("bhmn,bhmdn->bhdn", qt[:, :, r], mixed)
        return out.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, table = ctx.saved_tensors
        qt, kt, vt, yt = (x.mT.contiguous() for x in (q, k, v, grad))
        q_len, k_len, length = q.shape[-2], k.shape[-2], transform_length(table.shape[1])
        kernel = spectrum(table, q_len, length)[:, None, None]
        shared = kernel.new_zeros(q.shape[1], kernel.shape[-1])
        dq, dk, dv = torch.empty_like(qt), torch.empty_like(kt), torch.zeros_like(vt)
        for r in _features(kt, vt, length):
            keys = torch.fft.rfft(_outer(kt[:, :, r], vt), length)
            rows = torch.fft.rfft(_outer(qt[:, :, r], yt), length)
            there = torch.fft.irfft(keys * kernel, length)[..., :q_len]
            back = torch.fft.irfft(rows * kernel.conj(), length)[..., :k_len]
            dq[:, :, r] = torch.einsum("bhmdn,bhdn->bhmn", there, yt)
            dk[:, :, r] = torch.einsum("bhmdn,bhdn->bhmn", back, vt)
            dv += torch.einsum("bhmdn,bhmn->bhdn", back, kt[:, :, r])
            shared += (rows * keys.conj()).sum((0, 2, 3))
        dc = table_of(torch.fft.irfft(shared, length), q_len, k_len)
        return dq.mT, dk.mT, dv.mT, dc.sum(0, keepdim=True) if table.shape[0] == 1 else dc


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """``(B, H, m, N)`` and ``(B, H, D, N)`` → ``(B, H, m, D, N)``."""
    return a[:, :, :, None] * b[:, :, None]


def _features(k: Tensor, v: Tensor, length: int) -> list[slice]:
    """Slices of the features whose transforms fit the buffer."""
    step = max(1, BUFFER // max(1, v[..., 0].numel() * length))
    return [slice(i, i + step) for i in range(0, k.shape[2], step)]
