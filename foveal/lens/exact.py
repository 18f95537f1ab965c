"""Figures over all rows, from attention itself: O(N) memory, no sampling error.

Three identities do the work. With ``lse`` the log-sum-exp of a row's logits over a set of keys,

- mass on a fixed set of keys is attention whose V is the set's indicator;
- mass on a set that moves with the row, such as its local window, is ``exp(lse_set − lse_all)``;
- what a key receives in total is the gradient of the summed outputs with respect to a V of one column.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..kernels import native
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute, refusals
from .scores import budget, logits

Role = Literal["self", "cross"]
MIN_COLUMNS = 16
"""Fewest columns of V that every implementation takes."""


@dataclass(frozen=True, eq=False)
class RowMasses:
    """One value per row and head, ``(B, H, Nq)`` float32; rows that see nothing hold 0 (and ``lse`` −inf).

    Attributes:
        sink: mass on the first tokens of the row's own sequence.
        window: mass on the row's local window, without the sinks that lie in it.
        rest: mass on all other keys.
        learned_sink: mass on the learned logit that has no value, 0 without one. The four add up to 1.
        distance: mean look-back distance in tokens over the mass on keys, or None when the mask is not causal.
        lse: log-sum-exp over the keys, without the learned sink.
        entropy: of the distribution over keys, in nats; None where no kernel measures it in the same pass.
        real: ``(B, Nq)`` bool, False on padding rows and rows that see no key.
    """

    sink: Tensor
    window: Tensor
    rest: Tensor
    learned_sink: Tensor
    distance: Tensor | None
    lse: Tensor
    entropy: Tensor | None
    real: Tensor


@torch.no_grad()
def row_masses(
    call: AttentionCall, sink_logits: Tensor | None, *, window: int, sinks: int, role: Role = "self"
) -> RowMasses:
    """Where every row's attention goes; costs one dense attention and the scores of about two windows per row.

    Args:
        call: its ``layout`` and ``v`` are not used: the dense attention of the model is measured.
        sink_logits: ``(H,)`` learned logits of a key without a value, or None.
        window: tokens of the local window, counting the row's own; opens to both sides when the mask is not causal.
        sinks: first tokens of a sequence (by rank, so after left padding and inside a packed document).
        role: in cross-attention rows and keys share no positions: the window is empty and there is no distance.
    """
    base = call.base
    columns = _columns(base, sinks, call.k.shape, call.k.dtype)
    call = call.replace(q=call.q.detach(), k=call.k.detach(), layout=None, return_lse=True)
    call_on_columns = call.replace(v=columns)
    entropy: Tensor | None = None
    if refusals("native", call_on_columns):
        out, found = compute(call_on_columns)
        assert found is not None
        lse = found
    else:
        out, lse, entropy = native.attend_with_entropy(call_on_columns)
    lse, sink = lse.float(), out[..., 0].float()
    real = torch.isfinite(lse).any(1)
    if role == "self" and base.valid is not None:
        own = torch.arange(base.q_len, device=base.device) + base.shift
        inside = (own >= 0) & (own < base.kv_len)
        real = real & inside & base.valid[:, own.clamp(0, base.kv_len - 1)]
    everything = lse if sink_logits is None else torch.logaddexp(lse, sink_logits.float()[None, :, None].expand_as(lse))
    seen = torch.isfinite(everything)
    safe = torch.where(seen, everything, 0.0)
    on_keys = torch.exp(lse - safe)
    sink = sink * on_keys
    if role == "cross":
        local = torch.zeros_like(lse)
    elif window >= base.kv_len:
        local = (on_keys - sink).clamp(min=0)
    else:
        local = torch.exp(_window_lse(call, window, sinks) - safe)
    rest = (on_keys - sink - local).clamp(min=0)
    learned = torch.where(seen, 1 - on_keys, 0.0) if sink_logits is not None else torch.zeros_like(lse)
    distance = _distance(base, out) if base.causal and role == "self" else None
    return RowMasses(sink, local, rest, learned, distance, lse, entropy, real)


def _window_lse(call: AttentionCall, window: int, sinks: int) -> Tensor:
    """``(B, H, Nq)`` float32 log-sum-exp over the keys of each row's window that are not sinks, some rows at a time."""
    batch, heads, q_len = call.q.shape[:3]
    step = max(1, min(window, budget(call.q.device) // (heads * 2 * window)))
    out = torch.full((batch, heads, q_len), -torch.inf, device=call.q.device)
    for b in range(batch):
        memo = ("lens_window", window, sinks, step, b)  # layers that share a base mask share its windows
        if memo not in call.base.cache:
            call.base.cache[memo] = list(_windows(call.base, window, sinks, step, b))
        for index, keys, seen in call.base.cache[memo]:
            out[b, :, index] = torch.logsumexp(logits(call, b, index, keys, seen, hidden=-torch.inf), -1).float()
    return out


def _windows(base: BaseMask, window: int, sinks: int, step: int, b: int) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """``step`` rows of sequence ``b``, the range of keys of their windows, and who sees whom ``(rows, keys)``."""
    ahead = 1 if base.causal else window
    for start in range(0, base.q_len, step):
        index = torch.arange(start, min(start + step, base.q_len), device=base.device)
        own = index[:, None] + base.shift
        first = max(0, start + base.shift - window + 1)
        last = min(base.kv_len, start + base.shift + index.numel() - 1 + ahead)
        if first >= last:
            continue
        position = torch.arange(first, last, device=base.device)
        rank = base.rank[b % base.rank.shape[0], first:last]
        at = torch.full((1, 1), b, device=base.device)
        seen = base.allowed(at, torch.zeros_like(at), index[:, None], position[None])
        seen = seen & (position > own - window) & (position < own + ahead) & ~((rank >= 0) & (rank < sinks))
        yield index, slice(first, last), seen


def _blocks(base: BaseMask, columns: int) -> tuple[int, int]:
    """Number of thermometer columns and keys per block of positions."""
    count = columns - 3
    return count, max(1, -(-base.kv_len // (count + 1)))


def _columns(base: BaseMask, sinks: int, k_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """V ``(B, Hkv, Nk, C)``: is a sink; position inside its block, high and low; position below the end of block 1, 2, ….

    A half-precision output would round a mean position of thousands by several tokens. So positions enter as a
    thermometer over blocks: for a row in block ``u``, ``Σ_{c ≤ u} P(block < c)`` is the mean distance in blocks, a sum of
    the small masses far away, which keep their relative precision. Inside a block the position is split so that every
    column holds an integer that bfloat16 represents exactly.
    """
    memo = ("lens_columns", sinks, tuple(k_shape), dtype)
    if memo not in base.cache:
        base.cache[memo] = _make_columns(base, sinks, k_shape, dtype)
    return base.cache[memo]


def _make_columns(base: BaseMask, sinks: int, k_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    batch, kv_heads, kv_len, head_dim = k_shape
    width = max(head_dim, MIN_COLUMNS)  # as wide as q, where a kernel asks for that
    count, size = _blocks(base, width)
    position = torch.arange(kv_len, device=base.device)
    block, inside = position // size, position % size
    far = block[:, None] < torch.arange(1, count + 1, device=base.device)
    shared = torch.cat([(inside // 256)[:, None], (inside % 256)[:, None], far.long()], 1).to(dtype)
    first = ((base.rank >= 0) & (base.rank < sinks)).to(dtype)[:, None, :, None]
    shape = (batch, kv_heads, kv_len)
    return torch.cat([first.expand(*shape, 1), shared.expand(*shape, width - 1)], -1)


def _distance(base: BaseMask, out: Tensor) -> Tensor:
    """Mean of ``own position − key position`` per row from the columns' outputs, ``(B, H, Nq)`` float32."""
    count, size = _blocks(base, out.shape[-1])
    own = torch.arange(base.q_len, device=base.device) + base.shift
    passed = torch.arange(1, count + 1, device=base.device) <= (own // size)[:, None]
    out = out.float()
    blocks = torch.linalg.vecdot(out[..., 3:], passed.float()[None, None])
    return size * blocks + (own % size) - (256 * out[..., 1] + out[..., 2])


def received_mass(call: AttentionCall, real: Tensor | None = None) -> Tensor:
    """Share of the attention that each key receives, exact over all rows: ``(B, H, Nk)`` float32, sums to 1 per head.

    The gradient with respect to V of the mean over rows. Costs a forward and a backward, so :func:`profile_attention`
    estimates the same figure from its sampled rows instead.

    Args:
        call: its ``layout`` is honoured, its ``v`` is not used.
        real: ``(B, Nq)`` bool rows that count; default all rows.
    """
    batch, heads, q_len, head_dim = call.q.shape
    k = call.k.detach().repeat_interleave(call.groups, 1)
    v = torch.zeros(
        batch, heads, k.shape[2], max(head_dim, MIN_COLUMNS), dtype=k.dtype, device=k.device, requires_grad=True
    )
    real = torch.ones(batch, q_len, dtype=torch.bool, device=k.device) if real is None else real.expand(batch, q_len)
    with torch.enable_grad():
        out, _ = compute(call.replace(q=call.q.detach(), k=k, v=v, return_lse=False))
        upstream = torch.zeros_like(out)
        upstream[..., 0] = real[:, None].to(out.dtype)
        (gradient,) = torch.autograd.grad(out, v, upstream)
    return gradient[..., 0].float() / real.sum(-1).clamp(min=1)[:, None, None]
