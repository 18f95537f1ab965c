"""Attention of some rows over some keys, with its log-sum-exp: the pieces from which weights are redistributed exactly.

Within a row, scaling all weights of a group of keys by one number c only scales that group's partial output, so
``out' = out + Σ_g (c_g − 1) w_g out_g`` with ``w_g = exp(lse_g − lse)``. No N×N matrix is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.base_mask import BaseMask, Predicate
from .call import AttentionCall
from .dispatch import compute


def positions(member: Tensor) -> tuple[Tensor, Tensor]:
    """``(B, N)`` bool → ``(index (B, n), real (B, n))``: the members of each row in order, padded at the end to the longest."""
    count = member.sum(-1)
    most = int(count.max()) if member.numel() else 0
    order = torch.argsort(member.to(torch.int8), dim=-1, descending=True, stable=True)[:, :most]
    return order, torch.arange(most, device=member.device) < count[:, None]


def partial(
    call: AttentionCall, rows: Tensor, real_rows: Tensor, keys: Tensor | None, impl: str = "auto", sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of chosen rows over chosen keys, within what the call's base mask and layout allow.

    Args:
        call: the whole attention. rows, real_rows: ``(B, R)`` row numbers and which of them are real, see :func:`positions`.
        keys: ``(B, Nk)`` bool, or None for every key.
        sinks: ``(H,)`` learned sink logits that enter the log-sum-exp.

    Returns:
        ``out (B, H, R, Dv)`` and ``lse (B, H, R)``; 0 and −inf where a row sees none of the keys, or is not real.
    """
    if call.layout is not None or call.bias is not None:
        return _masked(call, rows, real_rows, keys, impl, sinks)
    batch, heads = call.q.shape[:2]
    base = call.base
    q = call.q.gather(2, rows[:, None, :, None].expand(batch, heads, -1, call.q.shape[-1]))
    lo, hi = (t.expand(batch, -1).gather(1, rows) for t in (base.lo, base.hi))
    k, v, valid = call.k, call.v, None if base.valid is None else base.valid.expand(batch, -1)
    index = None
    if keys is not None:
        index, there = positions(keys.expand(batch, -1))
        lo, hi = _inside(keys.expand(batch, -1), lo), _inside(keys.expand(batch, -1), hi)
        k, v = (
            t.gather(2, index[:, None, :, None].expand(batch, t.shape[1], -1, t.shape[-1])) for t in (call.k, call.v)
        )
        valid = there if valid is None else there & valid.gather(1, index)
    hi = torch.where(real_rows, torch.maximum(lo, hi), lo)
    count = k.shape[2]
    if count == 0 or rows.shape[1] == 0:
        empty = q.new_zeros(batch, heads, rows.shape[1], call.v.shape[-1])
        lse = torch.full(
            empty.shape[:3], -torch.inf, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32)
        )
        return empty, lse
    rank = torch.arange(count, device=q.device)[None]
    predicate = None if base.predicate is None else _picked(base.predicate, rows, index)
    picked = BaseMask(rows.shape[1], count, lo, hi, 0, False, rank, valid, predicate, False)
    if predicate is not None:
        picked.cache["predicate_batch"] = batch
    part = call.replace(q=q.contiguous(), k=k.contiguous(), v=v.contiguous(), base=picked, return_lse=True)
    out, lse_ = compute(part, _able(part, impl), sinks)
    assert lse_ is not None
    return out, lse_


def _inside(member: Tensor, bound: Tensor) -> Tensor:
    """How many members lie before each bound: ``(B, N)`` bool and ``(B, R)`` → ``(B, R)``."""
    before = torch.nn.functional.pad(member.long().cumsum(-1), (1, 0))
    return before.gather(1, bound)


def _picked(predicate: Predicate, rows: Tensor, index: Tensor | None) -> Predicate:
    def of(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return predicate(b, h, rows[b, q], k if index is None else index[b, k])

    return of


def _able(call: AttentionCall, impl: str) -> str:
    """The implementation asked for where it can run a part of the call, else any: a part's mask differs from the whole's."""
    from .dispatch import refusals

    return "auto" if impl == "auto" or refusals(impl, call) else impl


def _masked(
    call: AttentionCall, rows: Tensor, real_rows: Tensor, keys: Tensor | None, impl: str, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As :func:`partial` under a sparse layout or a bias: every row is computed, the other keys are hidden like padding."""
    base, batch, heads = call.base, *call.q.shape[:2]
    if keys is not None:
        valid = keys if base.valid is None else keys & base.valid
        base = BaseMask(
            base.q_len, base.kv_len, base.lo, base.hi, base.shift, base.causal, base.rank, valid, base.predicate
        )
        base.cache |= {k: v for k, v in call.base.cache.items() if k == "predicate_batch"}
    part = call.replace(base=base, return_lse=True)
    out, lse = compute(part, _able(part, impl), sinks)
    assert lse is not None
    out = out.gather(2, rows[:, None, :, None].expand(batch, heads, -1, out.shape[-1]))
    lse = lse.gather(2, rows[:, None].expand(batch, heads, -1))
    return out * real_rows[:, None, :, None], lse.masked_fill(~real_rows[:, None], -torch.inf)
