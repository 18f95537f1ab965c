"""Products with Toeplitz matrices ``T_ij = c_{j−i}``, by FFT in O(n log n), and kernelized attention weighted by one.

A table ``c`` ``(H or 1, Nq + Nk − 1)`` holds c_δ for δ = j − i from −(Nq − 1) to Nk − 1, at index δ + Nq − 1. Causal rows see
δ ≤ Nk − Nq only (aligned at the end, so δ ≤ 0 for equal lengths).

Rounding of an FFT is relative to the largest term anywhere, not to the row. A causal table, or one whose terms differ by many
orders of magnitude, loses whole rows in float32. ``precision="auto"`` bounds that loss from the table (:func:`amplification`)
and takes float32, float64, or, past both, the dense product.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.errors import ConfigError, ShapeError, nearest
from .call import compute_dtype
from .pooling import full_precision

Precision = Literal["auto", "float32", "float64", "dense"]
PRECISIONS = ("auto", "float32", "float64", "dense")
SHORT = 64
"""Up to this many rows the dense product is as fast, and exact in every row."""
FLOAT32_LIMIT, FLOAT64_LIMIT = 32.0, 1e9
"""Largest :func:`amplification` for each: a row then keeps about 1e-5 (float32) or 1e-7 (float64) of relative accuracy."""
BUFFER = 1 << 22
"""Elements transformed at once; bounds memory beside the inputs and outputs."""
DENSE_BUFFER = 1 << 22


def toeplitz_reference(c: Tensor, a: Tensor, *, causal: bool = False) -> Tensor:
    """The definition: ``y_i = Σ_j c_{j−i} a_j`` with the whole matrix, in float64. Arguments as :func:`toeplitz_matmul`."""
    q_len = check_table(c, a.shape[-2])
    table = visible(c, q_len, causal).double()
    return table.unfold(-1, a.shape[-2], 1).flip(-2) @ a.double()


def toeplitz_matmul(c: Tensor, a: Tensor, *, causal: bool = False, precision: Precision = "auto") -> Tensor:
    """``y_i = Σ_j c_{j−i} a_j`` for every row i.

    Args:
        c: ``(H or 1, Nq + Nk − 1)``, see the module. a: ``(…, H, Nk, f)``.
        causal: rows see δ ≤ Nk − Nq only; the other entries of ``c`` are ignored and get no gradient.
        precision: of the transform; ``"dense"`` multiplies the matrix itself, block by block of rows. ``"auto"`` reads the
            table's values, which waits for the device.

    Returns:
        ``(…, H, Nq, f)`` in a's dtype; half precision is transformed in float32. Gradients flow to ``c`` and ``a``.

    Raises:
        ShapeError: a table too short for ``a``, or of other heads. ConfigError: an unknown precision.
    """
    q_len = check_table(c, a.shape[-2])
    if a.dim() < 3 or c.shape[0] not in (1, a.shape[-3]) or not a.is_floating_point():
        raise ShapeError(
            f"c has shape {tuple(c.shape)} and a {tuple(a.shape)}, {a.dtype}; expected c (H or 1, Nq + Nk − 1) and a floating (…, H, Nk, f)."
        )
    table = visible(c, q_len, causal)
    chosen = choose(table, q_len, precision, a.dtype)
    with full_precision(a):
        if chosen == "dense":
            return _dense(table.to(compute_dtype(a.dtype)), a, q_len).to(a.dtype)
        dtype = torch.float64 if chosen == "float64" else torch.float32
        out: Tensor = _Product.apply(table.to(dtype), a.to(dtype).mT, q_len)
    return out.mT.to(a.dtype)


def check_table(c: Tensor, k_len: int) -> int:
    """Nq of a table for ``k_len`` keys; raises :class:`ShapeError` when it is too short."""
    if c.dim() != 2 or not c.is_floating_point() or c.shape[1] < k_len or not k_len:
        raise ShapeError(
            f"the table has shape {tuple(c.shape)} and dtype {c.dtype}; expected floating (heads or 1, Nq + Nk − 1) with Nk = {k_len} of at least 1."
        )
    return c.shape[1] - k_len + 1


def visible(c: Tensor, q_len: int, causal: bool) -> Tensor:
    """The table with zeros where causal rows see nothing."""
    if not causal:
        return c
    k_len = c.shape[1] - q_len + 1
    delta = torch.arange(c.shape[1], device=c.device) - (q_len - 1)
    return c.masked_fill(delta > k_len - q_len, 0.0)


def amplification(table: Tensor, q_len: int) -> float:
    """How much larger the FFT's rounding may be than a row's own sum, for terms of like size: ‖c‖·√Nk over the least row sum.

    Rows whose entries are all zero are left out.
    """
    size = table.detach().abs().double()
    k_len = table.shape[1] - q_len + 1
    total = torch.nn.functional.pad(size.cumsum(-1), (1, 0))
    rows = total[:, k_len:] - total[:, :-k_len]  # the window of row Nq − 1, …, 0
    rows = torch.maximum(rows, _window_max(size, k_len))  # where the difference of two sums cancels
    least = rows.masked_fill(rows == 0, torch.inf).amin(-1)
    worst = size.square().sum(-1).sqrt() * k_len**0.5 / least
    return float(worst.max()) if worst.numel() else 0.0


def _window_max(x: Tensor, width: int) -> Tensor:
    """Largest entry of every ``width`` consecutive ones, in O(n): maxima from both ends of blocks of that width."""
    count = x.shape[-1] - width + 1
    blocked = torch.nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
    from_left = blocked.cummax(-1).values.flatten(-2)
    from_right = blocked.flip(-1).cummax(-1).values.flip(-1).flatten(-2)
    return torch.maximum(from_right[..., :count], from_left[..., width - 1 : width - 1 + count])


def choose(table: Tensor, q_len: int, precision: str, dtype: torch.dtype) -> str:
    """What ``precision`` means for this table: ``"float32"``, ``"float64"`` or ``"dense"``.

    Raises:
        ConfigError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}. {nearest(str(precision), PRECISIONS)}")
    if precision != "auto":
        return precision
    if table.shape[1] < 2 * SHORT:
        return "dense"
    worst = amplification(table, q_len)
    if worst <= FLOAT32_LIMIT and dtype != torch.float64:
        return "float32"
    if worst <= FLOAT64_LIMIT:
        return "float64"
    warnings.warn(
        f"the Toeplitz table spans a factor of {worst:.1g} between its norm and its smallest row, more than float64 resolves by FFT: "
        "the dense O(n²) product runs instead. Clamp the bias (±5 is safe), or pass precision='float64' to accept the loss.",
        stacklevel=3,
    )
    return "dense"


def transform_length(c_len: int) -> int:
    """The next length of small prime factors that leaves room for every offset without wrapping around."""
    best = 1 << max(0, c_len - 1).bit_length()
    for three in (1, 3, 9):
        for five in (1, 5):
            odd = three * five
            best = min(best, odd << max(0, -(-c_len // odd) - 1).bit_length())
    return best


def spectrum(table: Tensor, q_len: int, length: int) -> Tensor:
    """``(H, length // 2 + 1)`` transform of the kernel t[k] = c_{−k}, t[length − k] = c_k."""
    kernel = table.new_zeros(table.shape[0], length)
    kernel[:, :q_len] = table[:, :q_len].flip(-1)
    k_len = table.shape[1] - q_len + 1
    if k_len > 1:
        kernel[:, length - k_len + 1 :] = table[:, q_len:].flip(-1)
    return torch.fft.rfft(kernel)


def table_of(correlation: Tensor, q_len: int, k_len: int) -> Tensor:
    """The inverse of the layout in :func:`spectrum`: ``(H, length)`` → ``(H, Nq + Nk − 1)``."""
    ahead = correlation[:, correlation.shape[1] - k_len + 1 :].flip(-1)
    return torch.cat([correlation[:, :q_len].flip(-1), ahead], -1)


class _Product(torch.autograd.Function):
    """``(table (H or 1, Nq + Nk − 1), a (…, H, f, Nk)) → (…, H, f, Nq)``."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, a: Tensor, q_len: int) -> Tensor:
        ctx.save_for_backward(table, a)
        ctx.q_len = q_len
        length = transform_length(table.shape[1])
        kernel = spectrum(table, q_len, length)[:, None]
        parts = [
            torch.fft.irfft(torch.fft.rfft(a[..., s, :], length) * kernel, length)[..., :q_len]
            for s in blocks(a, length)
        ]
        return torch.cat(parts, -2) if len(parts) != 1 else parts[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, a = ctx.saved_tensors
        q_len: int = ctx.q_len
        k_len, length = a.shape[-1], transform_length(table.shape[1])
        kernel = spectrum(table, q_len, length)[:, None].conj()
        parts, shared = [], kernel.new_zeros(a.shape[-3], length // 2 + 1)
        for s in blocks(a, length):
            g = torch.fft.rfft(grad[..., s, :], length)
            parts.append(torch.fft.irfft(g * kernel, length)[..., :k_len])
            product = g * torch.fft.rfft(a[..., s, :], length).conj()
            shared += product.reshape(-1, *product.shape[-3:]).sum((0, 2))
        dc = table_of(torch.fft.irfft(shared, length), q_len, k_len)
        return dc.sum(0, keepdim=True) if table.shape[0] == 1 else dc, torch.cat(parts, -2), None


def blocks(a: Tensor, length: int) -> list[slice]:
    """Slices of the second last axis whose transforms fit :data:`BUFFER`."""
    lead = max(1, a[..., :1, :1].numel()) * length
    step = max(1, BUFFER // lead)
    return [slice(i, i + step) for i in range(0, max(1, a.shape[-2]), step)]


def _dense(table: Tensor, a: Tensor, q_len: int) -> Tensor:
    """Rows of the matrix itself, a block at a time."""
    a = a.to(table.dtype)
    lanes = table.unfold(-1, a.shape[-2], 1)  # (H, Nq, Nk), row Nq − 1 first
    step = max(1, DENSE_BUFFER // max(1, table.shape[0] * a.shape[-2]))
    parts = [lanes[:, max(0, end - step) : end].flip(-2) @ a for end in range(q_len, 0, -step)]
    return torch.cat(parts, -2) if len(parts) != 1 else parts[0]
