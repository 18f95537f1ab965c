"""``foveal.attention``: check the arguments once, choose an implementation, run it; ``foveal.explain`` says which and why."""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError, UnsupportedError, nearest
from ..core.layouts import BlockMask, Groups, KeySelection, Layout
from . import flex, gather, native, reference, sdpa, triton
from .call import AttentionCall
from .merge import add_sink
from .prepared import selected

if TYPE_CHECKING:
    from ..patterns.base import Pattern

IMPLEMENTATIONS: dict[str, tuple[str, str]] = {
    "reference": ("anywhere", "the definition, float64; the oracle of every test"),
    "gather": ("anywhere", "block-sparse, list-sparse and ragged attention in plain PyTorch, with gradients"),
    "sdpa": ("anywhere", "dense attention by torch's own kernel"),
    "native": ("CPU", "C++ kernels"),
    "flex": ("GPU, CPU inference", "compiled FlexAttention for block masks"),
    "triton": ("GPU", "Triton kernels for key lists and groups, which FlexAttention cannot express"),
}
"""Every implementation: where it runs and what it is for."""


@dataclass(frozen=True)
class Explanation:
    """Which implementation a call gets, and why; ``str()`` of it is a readable table.

    Attributes:
        impl: the implementation chosen.
        why: the reason, one clause.
        refused: for every other implementation, the reasons against it.
    """

    impl: str
    why: str
    refused: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.impl}: {self.why}"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.refused.items()]
        return "\n".join(lines)


@functools.cache
def missing(impl: str) -> str | None:
    """Why an implementation is not available on this machine at all, or None."""
    if impl == "native":
        return native.unavailable()
    if impl == "triton":
        return triton.unavailable()
    if impl == "flex":
        return flex.unavailable()
    return None


_MODULES: dict[str, Any] = {
    "reference": reference,
    "gather": gather,
    "sdpa": sdpa,
    "native": native,
    "flex": flex,
    "triton": triton,
}


def refusals(impl: str, call: AttentionCall) -> list[str]:
    """Every reason why ``impl`` cannot run ``call``; empty when it can."""
    why = missing(impl)
    if why:
        return [why]
    check = getattr(_MODULES[impl], "refusals", None)
    return check(call) if check else []


def _order(call: AttentionCall) -> list[tuple[str, str]]:
    """Implementations in the order in which ``auto`` tries them, with the reason for each."""
    cuda = call.q.device.type == "cuda"
    if call.layout is None:
        order = [("native", "C++ kernel"), ("sdpa", "torch's own dense kernel is the fastest dense path here")]
        if _suits_sdpa(call):
            order.reverse()
        if cuda:
            order.append(("flex", "dense with a mask that SDPA would have to materialise"))
        return [*order, ("gather", "dense, tile by tile, without an N×N mask")]
    own = ("triton", "own GPU kernel") if cuda else ("native", "C++ kernel")
    if cuda and isinstance(call.layout, BlockMask):
        return [own, ("flex", "compiled block-sparse kernel"), ("gather", "plain PyTorch block-sparse")]
    return [own, ("gather", "really skips what the layout drops, with gradients, on any device")]


def _suits_sdpa(call: AttentionCall) -> bool:
    """Whether torch's dense kernel is the quicker one on CPU: small calls, in which what a call costs apart from its work decides.

    The limits, in multiply-adds, are where the two cross. One row reads a cache, which shared key heads make smaller; in half
    precision torch has no quick way to do that.
    """
    work = call.q.shape[:3].numel() * call.k.shape[2] * (call.q.shape[3] + call.v.shape[3])
    if call.q.shape[2] == 1:
        limit = 0 if call.q.dtype != torch.float32 else 1 << 22 if call.groups > 1 else 1 << 24
    else:
        limit = 1 << 25 if call.q.dtype == torch.float32 else 1 << 23
    return work < limit


def pick(call: AttentionCall) -> str:
    """The name that ``impl="auto"`` runs for this call."""
    return next(name for name, _ in _order(call) if not refusals(name, call))


def choose(call: AttentionCall) -> Explanation:
    """What ``impl="auto"`` picks for this call, why, and what speaks against every other implementation."""
    chosen = pick(call)
    order = dict(_order(call))
    refused = {
        name: refusals(name, call) or [f"could run this call; chosen against: {_against(name)}"]
        for name in IMPLEMENTATIONS
        if name != chosen
    }
    return Explanation(chosen, order[chosen], refused)


def _against(name: str) -> str:
    return {
        "reference": "O(N²) memory, float64",
        "flex": "compiles for every new shape",
        "gather": "slower than the chosen one for this layout",
        "sdpa": "slower than the chosen one",
    }.get(name, "slower than the chosen one")


_warned: set[str] = set()


def _warn_if_slow(call: AttentionCall, impl: str) -> None:
    """Say once when the chosen path is far from what this machine could do, and name the fix."""
    if impl == "gather" and call.q.device.type == "cuda" and isinstance(call.layout, BlockMask):
        reasons = refusals("flex", call)
        if reasons and "slow-gather" not in _warned:
            _warned.add("slow-gather")
            warnings.warn(
                f"foveal: block-sparse attention runs in plain PyTorch here because FlexAttention {reasons[0]}. "
                "It may be ten times slower; foveal.explain(...) shows every reason.",
                stacklevel=4,
            )


def compute(call: AttentionCall, impl: str = "auto", sink_logits: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Run a validated call: ``(out, lse)``; lse is None only when not asked for. The door of ``foveal.hf``."""
    if sink_logits is not None:
        call = call.replace(return_lse=True)
    if impl == "auto":
        impl = pick(call)
        _warn_if_slow(call, impl)
    else:
        if impl not in IMPLEMENTATIONS:
            raise ConfigError(f"impl={impl!r} is unknown. {nearest(impl, IMPLEMENTATIONS)}")
        absent = missing(impl)
        if absent:
            raise UnsupportedError(
                f"impl={impl!r} is not available here: {absent}. Use impl='auto', or see foveal.explain(...)."
            )
        reasons = refusals(impl, call)
        if reasons:
            raise UnsupportedError(
                f"impl={impl!r} cannot run this call: it {'; '.join(reasons)}. Use impl='auto', or see foveal.explain(...)."
            )
    out, lse = _MODULES[impl].attend(call)
    if sink_logits is not None:
        out, lse = add_sink(out, lse, sink_logits)
    return out, lse


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Layout | Pattern | None = None, *, causal: bool = False, scale: float | None = None, softcap: float | None = None, sink_logits: Tensor | None = None, bias: Tensor | None = None, impl: str = "auto", return_lse: Literal[False] = False) -> Tensor: ...  # fmt: skip
@overload
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Layout | Pattern | None = None, *, causal: bool = False, scale: float | None = None, softcap: float | None = None, sink_logits: Tensor | None = None, bias: Tensor | None = None, impl: str = "auto", return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Layout | Pattern | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the pairs that ``mask`` keeps.

    Args:
        q: ``(B, H, Nq, D)``.
        k: ``(B, Hkv, Nk, D)``; H is a multiple of Hkv.
        v: ``(B, Hkv, Nk, Dv)`` with any ``Dv ≥ 1``.
        mask: a layout (``BlockMask``, ``KeySelection``, ``Groups``), a ``Pattern``, or None for dense.
        causal: queries see no later key, aligned bottom-right (the last query sees every key); ANDed with ``mask``.
        scale: factor of ``q·k``; default ``1/sqrt(D)``. An explicit 0.0 is honoured.
        softcap: logits become ``softcap · tanh(logits / softcap)``.
        sink_logits: ``(H,)`` learned logits of one key without a value per head.
        bias: ``(H, 2R+1)`` relative-position table, added after softcap; entry ``R + clamp(key − query, −R, R)``.
        impl: ``auto`` or a name in ``foveal.kernels.IMPLEMENTATIONS``; an explicit name never falls back.
        return_lse: also return ``(B, H, Nq)`` log-sum-exps, for ``foveal.merge``.

    Returns:
        ``(B, H, Nq, Dv)`` in q's dtype. A row that sees nothing gives zeros and lse −inf.

    Raises:
        ShapeError: tensors that do not fit each other or the mask.
        ConfigError: an unknown ``impl``, or a scale or softcap that is not a finite number.
        UnsupportedError: an explicit ``impl`` that cannot run this call, with every reason.
    """
    call = prepare(
        q,
        k,
        v,
        mask,
        causal=causal,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        bias=bias,
        return_lse=return_lse,
    )
    out, lse = compute(call, impl, sink_logits)
    if return_lse:
        assert lse is not None
        return out, lse
    return out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Layout | Pattern | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> Explanation:
    """What ``impl="auto"`` would run for these arguments, why, and what speaks against every other implementation."""
    call = prepare(
        q,
        k,
        v,
        mask,
        causal=causal,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        bias=bias,
        return_lse=return_lse,
    )
    return choose(call.replace(return_lse=return_lse or sink_logits is not None))


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Layout | Pattern | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    return_lse: bool = False,
) -> AttentionCall:
    """Check the arguments of :func:`attention` and turn them into one call; raises what :func:`attention` documents."""
    check_tensors(q, k, v)
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ConfigError(f"{name} is {value!r}; expected a finite number or None.")
    if softcap is not None and softcap <= 0:
        raise ConfigError(f"softcap is {softcap!r}; expected a number above 0, or None for no softcap.")
    heads = q.shape[1]
    if sink_logits is not None and tuple(sink_logits.shape) != (heads,):
        raise ShapeError(
            f"sink_logits has shape {tuple(sink_logits.shape)}; expected ({heads},), one logit per query head."
        )
    if bias is not None and (bias.dim() != 2 or bias.shape[0] != heads or bias.shape[1] % 2 == 0):
        raise ShapeError(
            f"bias has shape {tuple(bias.shape)}; expected (H={heads}, 2R+1), an odd number of relative distances per head, never an N×N tensor."
        )
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    base = BaseMask.build(q.shape[2], k.shape[2], causal=causal, device=q.device)
    layout = _layout(mask, q, k, base, scale)
    return AttentionCall(q, k, v, layout, base, scale, softcap, bias, return_lse)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise :class:`ShapeError` unless q, k and v fit each other."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor) or t.dim() != 4:
            shape = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ShapeError(f"{name} is {shape}; expected a 4-D tensor (batch, heads, length, head_dim).")
        if not t.is_floating_point():
            raise ShapeError(f"{name} has dtype {t.dtype}; expected a floating-point tensor.")
        if t.dtype != q.dtype or t.device != q.device:
            raise ShapeError(
                f"{name} is {t.dtype} on {t.device} and q is {q.dtype} on {q.device}; expected the same dtype and device."
            )
    if q.shape[0] != k.shape[0] or k.shape[0] != v.shape[0]:
        raise ShapeError(f"q, k and v have batch sizes {q.shape[0]}, {k.shape[0]} and {v.shape[0]}; expected the same.")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise ShapeError(f"k has shape {tuple(k.shape)} and v {tuple(v.shape)}; expected the same heads and length.")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"q has {q.shape[1]} heads and k has {k.shape[1]}; num_heads must be a multiple of num_kv_heads."
        )
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ShapeError(f"q has head_dim {q.shape[-1]} and k has {k.shape[-1]}; expected the same, at least 1.")
    if v.shape[-1] == 0:
        raise ShapeError("v has head_dim 0; expected at least 1.")


_validated: weakref.WeakKeyDictionary[KeySelection | Groups, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""Sizes for which a layout was found right: layers and steps share layouts, and the tensors of one never change."""


def _layout(mask: Any, q: Tensor, k: Tensor, base: BaseMask, scale: float) -> Layout | None:
    if mask is None:
        return None
    if isinstance(mask, BlockMask):
        batch, heads = mask.kv_num_blocks.shape[:2]
        if batch not in (1, q.shape[0]) or heads not in (1, q.shape[1]):
            raise ShapeError(
                f"the BlockMask has batch {batch} and {heads} heads; expected 1 or {q.shape[0]}, and 1 or {q.shape[1]}, as q has. "
                "Build it with B=None and H=None to share it."
            )
        return mask
    if isinstance(mask, (KeySelection, Groups)):
        sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        fits = _validated.setdefault(mask, set())
        if sizes not in fits:
            mask.validate(*sizes)
            fits.add(sizes)
        return mask
    if hasattr(mask, "select") and not isinstance(mask, Tensor):
        return selected(mask, q, k, base, scale)
    raise ShapeError(
        f"mask is a {type(mask).__name__}; expected a Pattern, BlockMask, KeySelection, Groups or None. "
        "A dense boolean mask has no sparse layout: use torch's scaled_dot_product_attention for it."
    )
