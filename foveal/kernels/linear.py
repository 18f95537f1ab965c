"""Linear attention over mapped features: ``out_i = φ(q_i)·Σ_j φ(k_j) v_jᵀ / (φ(q_i)·Σ_j φ(k_j) + ε)``.

The feature map is the caller's: ``q`` and ``k`` here are φ(q) and φ(k), with any number F of features. Three equal forms:
quadratic (``impl="reference"``, the definition), chunked (``"native"`` in C++ on CPUs, ``"chunked"`` in torch; ``"fast"`` takes
the first where it can) and one token at a time (:func:`linear_step`). Sets of different sizes in one flat array:
:func:`foveal.kernels.linear_ragged.linear_attention_packed`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError, UnsupportedError, nearest
from . import native
from .call import compute_dtype
from .linear_chunks import CHUNK, all_rows, earlier_rows, sums

Impl = Literal["fast", "native", "chunked", "reference"]
IMPLS = ("fast", "native", "chunked", "reference")
NATIVE_WIDTH = 256
"""Features and channels that the C++ form takes: above, its states leave the cache and torch's products are as fast."""


class LinearState(NamedTuple):
    """What linear attention remembers of the keys so far, in float32 at least.

    Attributes:
        kv: ``(B, Hkv, F, Dv)``, Σ φ(k_j) v_jᵀ (``(W, Hkv, F, Dv)`` for packed sets). k: ``(B, Hkv, F)``, Σ φ(k_j).
    """

    kv: Tensor
    k: Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    normalise: bool = True,
    eps: float = 0.0,
    valid: Tensor | None = None,
    state: LinearState | None = None,
    chunk: int = CHUNK,
    impl: Impl = "fast",
) -> tuple[Tensor, LinearState]:
    """Linear attention in O(N) time and memory.

    Args:
        q: ``(B, H, Nq, F)`` mapped queries. k: ``(B, Hkv, Nk, F)`` mapped keys; Hkv divides H. v: ``(B, Hkv, Nk, Dv)``.
        causal: row i meets keys up to i; needs Nq = Nk. Earlier keys come in by ``state``.
        normalise: divide by φ(q_i)·Σ φ(k_j) + ``eps``; a row whose divisor is 0 gives zeros. False gives the sums alone.
        valid: ``(B, Nk)`` bool, False on padding: such keys count for nothing, and with Nq = Nk such rows give zeros.
        state: of keys that every row sees besides these.
        chunk: rows per chunk of the causal form in torch.
        impl: ``"fast"``: ``"native"`` on CPU in float32 and half precision where F and Dv are at most 256, else ``"chunked"``;
            ``"reference"`` is quadratic and in float64.

    Returns:
        ``out`` ``(B, H, Nq, Dv)`` in v's dtype, and the state with these keys added; gradients flow through both. Sums are kept
        in float32 (float64 for float64 inputs), under autocast too.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit. ConfigError: an unknown ``impl``, a ``chunk`` below 1.
        UnsupportedError: ``impl="native"`` where it cannot run.
    """
    check(q, k, v, impl, chunk)
    if q.dim() != 4 or q.shape[0] != k.shape[0] or (causal and q.shape[2] != k.shape[2]):
        raise ShapeError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; expected (B, H, Nq, F) and (B, Hkv, Nk, F)"
            + (" with Nq = Nk, because causal=True." if causal else ".")
        )
    if valid is not None:
        if valid.shape != (k.shape[0], k.shape[2]) or valid.dtype != torch.bool:
            raise ShapeError(
                f"valid has shape {tuple(valid.shape)} and dtype {valid.dtype}; expected {(k.shape[0], k.shape[2])} bool, True on real tokens."
            )
        hidden = ~valid[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    dtype = torch.float64 if impl == "reference" else compute_dtype(v.dtype)
    start = joined_state(state, (k.shape[0], *k.shape[1:2], k.shape[-1], v.shape[-1]), normalise, dtype, v.device)
    if impl == "reference":
        out, end = _reference(q, k, v, start, causal, normalise)
        out = divided(out, normalise, eps)
    elif in_cpp(q, v, impl):
        grouped = q.unflatten(1, (k.shape[1], -1)), k[:, :, None], v[:, :, None]
        out, end = native_product(*grouped, start, None, causal, normalise, eps)
        out = out.flatten(1, 2)
    else:
        b, hkv = k.shape[:2]
        product = earlier_rows(chunk) if causal else all_rows
        values = with_ones(v, normalise)
        qs, ks, vs = (x.reshape(b * hkv, x.shape[1] // hkv, *x.shape[2:]) for x in (q, k, values))
        out, end = sums(qs, ks, vs, start.flatten(0, 1), product)
        out, end = out.unflatten(0, (b, hkv)).flatten(1, 2), end.unflatten(0, (b, hkv))
        out = divided(out, normalise, eps)
    out = out.to(v.dtype)
    if valid is not None and q.shape[2] == k.shape[2]:
        out = out.masked_fill(~valid[:, None, :, None], 0.0)
    return out, split_state(end, k, normalise, state)


def linear_step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState | None = None, *, normalise: bool = True, eps: float = 0.0
) -> tuple[Tensor, LinearState]:
    """One token: add ``k vᵀ`` to the state, then meet it with ``q``. What decoding runs; equal to a row of the causal form.

    Args:
        q: ``(B, H, F)``. k: ``(B, Hkv, F)``. v: ``(B, Hkv, Dv)``. state: of the tokens before; None before the first.

    Returns:
        ``out`` ``(B, H, Dv)`` in v's dtype and the new state.

    Raises:
        ShapeError: shapes that do not fit.
    """
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise ShapeError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected (B, H, F), (B, Hkv, F), (B, Hkv, Dv) of one token."
        )
    check(q[:, :, None], k[:, :, None], v[:, :, None], "fast", 1)
    dtype = compute_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        kv, z = k.to(dtype)[..., None] * v.to(dtype)[..., None, :], k.to(dtype)
        if state is not None:
            kv, z = kv + state.kv, z + state.k
        rows = q.to(dtype).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, F)
        out = rows @ kv
        if normalise:
            out = divided(torch.cat([out, rows @ z[..., None]], -1), True, eps)
    return out.flatten(1, 2).to(v.dtype), LinearState(kv, z)


def _reference(q: Tensor, k: Tensor, v: Tensor, start: Tensor, causal: bool, normalise: bool) -> tuple[Tensor, Tensor]:
    """The definition, with all pairs at once."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), with_ones(v.double(), normalise)
    end = start + k.mT @ v
    k, v, start = (x.repeat_interleave(groups, 1) for x in (k, v, start))
    pairs = q @ k.mT
    if causal:
        pairs = pairs.tril()
    return pairs @ v + q @ start, end


# --- shared with the packed form --------------------------------------------------------------------------------------


def check(q: Tensor, k: Tensor, v: Tensor, impl: str, chunk: int) -> None:
    """What both doors demand of tensors ``(…, heads, N, width)``."""
    if impl not in IMPLS:
        raise ConfigError(f"impl is {impl!r}. {nearest(str(impl), IMPLS)}")
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; expected at least 1 row.")
    if q.dim() < 3 or q.dim() != k.dim() or k.dim() != v.dim() or k.shape[:-1] != v.shape[:-1]:
        raise ShapeError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; expected k and v to agree in all but the last size, and q to have as many sizes."
        )
    if q.shape[-1] != k.shape[-1]:
        raise ShapeError(f"q has {q.shape[-1]} features and k has {k.shape[-1]}; map both by the same feature map.")
    if not k.shape[-3] or q.shape[-3] % k.shape[-3]:
        raise ShapeError(
            f"q has {q.shape[-3]} heads and k has {k.shape[-3]}; num_heads must be a multiple of num_kv_heads."
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()) or not (q.device == k.device == v.device):
        raise ShapeError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}; expected one floating dtype and one device."
        )


def refusals(q: Tensor, v: Tensor) -> list[str]:
    """Reasons why the C++ form cannot run the call."""
    reasons = []
    why = _missing()
    if why is not None:
        reasons.append(why)
    if q.device.type != "cpu":
        reasons.append(f"runs on CPU; the tensors are on {q.device.type}")
    if q.dtype not in native.TYPES:
        reasons.append("computes in float32 or lower")
    if not (0 < q.shape[-1] <= NATIVE_WIDTH and 0 < v.shape[-1] <= NATIVE_WIDTH):
        reasons.append(f"takes 1 to {NATIVE_WIDTH} features and channels, not {q.shape[-1]} and {v.shape[-1]}")
    return reasons


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    return native.unavailable()


def in_cpp(q: Tensor, v: Tensor, impl: str) -> bool:
    """Whether the C++ form runs the call.

    Raises:
        UnsupportedError: ``impl="native"`` asks for it and it cannot.
    """
    if impl not in ("fast", "native"):
        return False
    reasons = refusals(q, v)
    if reasons and impl == "native":
        raise UnsupportedError(f"impl='native' {'; '.join(reasons)}. Use impl='fast', which takes what can run.")
    return not reasons


def native_product(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, cu: Tensor | None, causal: bool, normalise: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`foveal.kernels.native.linear.product`, imported when first used: it needs the compiled part."""
    from .native.linear import product

    return product(q, k, v, start, cu=cu, causal=causal, normalise=normalise, eps=eps)


def with_ones(v: Tensor, normalise: bool) -> Tensor:
    """Values with a last column of ones, whose sum is the divisor."""
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1) if normalise else v


def divided(out: Tensor, normalise: bool, eps: float) -> Tensor:
    """All but the last column over the last one; zeros where that is 0."""
    if not normalise:
        return out
    divisor = out[..., -1:] + eps
    blind = divisor == 0
    return out[..., :-1] * divisor.masked_fill(blind, 1.0).reciprocal().masked_fill(blind, 0.0)


def joined_state(
    state: LinearState | None, shape: tuple[int, ...], normalise: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The state as one tensor ``(B, Hkv, F, Dv)``, with φ(k) as a last column when there is a divisor; zeros for None.

    Raises:
        ShapeError: a state of another shape.
    """
    if state is None:
        return torch.zeros(*shape[:-1], shape[-1] + normalise, dtype=dtype, device=device)
    if tuple(state.kv.shape) != shape or tuple(state.k.shape) != shape[:-1]:
        raise ShapeError(
            f"state has kv {tuple(state.kv.shape)} and k {tuple(state.k.shape)}; expected {shape} and {shape[:-1]}: a state belongs to one layer and batch."
        )
    both = [state.kv, state.k[..., None]] if normalise else [state.kv]
    return torch.cat(both, -1).to(dtype)


def split_state(end: Tensor, k: Tensor, normalise: bool, before: LinearState | None) -> LinearState:
    """The state that goes out; without a divisor Σ φ(k) is summed here."""
    if normalise:
        return LinearState(end[..., :-1], end[..., -1])
    total = k.to(end.dtype).sum(-2)
    return LinearState(end, total if before is None else total + before.k)
