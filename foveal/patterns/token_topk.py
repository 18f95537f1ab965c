"""Token top-k: every query keeps the single keys with the largest logits (Kinetics, arXiv 2506.05333, oracle top-k)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import BaseMask
from ..core.budget import Budget
from ..core.context import SelectContext, State
from ..core.layouts import KeySelection, Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..kernels.call import compute_dtype
from ..kernels.pooling import fill, filled_keys, full_precision, pooled_scores
from .base import LookAhead, Pattern

SCORES = 1 << 22
"""Logits held at a time."""


@register("pattern", "token_topk")
@dataclass(frozen=True)
class TokenTopK(Pattern):
    """Every query keeps its first and last tokens and, of the others, those with the largest logits.

    Attributes:
        budget: keys kept per row, counting sinks and local keys. ``tokens``: exactly so many, where there are so many;
            ``density``: the nearest share of the keys that the row may see; ``mass``: the fewest keys that hold this share of
            the attention (averaged over the query heads that choose together).
        q_block: rows that share one list, the union of what each keeps; their last row is known only at the block's end, so
            ``look_ahead`` is ``"block"`` (``"none"`` for 1, the paper's decoding).
        sinks: first tokens of each sequence, always kept.
        local: tokens before the query that stay, counting the query itself. The authors' traces use 0, with which even the
            query's own key has to compete.
        per_head: choose for each query head; otherwise once per KV group, by the mean of its heads' logits, as the authors do.

    An oracle: all logits are computed to choose, so it shows what a selection could reach at best and saves the reading of
    values only. In prefill it costs more than dense attention, and its lists hold ``rows × budget`` numbers per KV head; the
    authors keep prefill dense, which a policy says with ``Dense()`` for prefill. There is no state.
    """

    budget: Budget
    q_block: int = 1
    sinks: int = 4
    local: int = 1
    per_head: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name, low in (("q_block", 1), ("sinks", 0), ("local", 0)):
            check_range(self, name, low=low)

    @property
    def look_ahead(self) -> LookAhead:
        return "block" if self.q_block > 1 else "none"

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``KeySelection`` with ascending lists; None when the budget holds everything."""
        base, budget = ctx.base, self.budget
        if 1.0 in (budget.density, budget.mass) or base.q_len == 0 or base.kv_len == 0:
            return None, state
        if budget.tokens is not None and budget.tokens >= filled_keys(base):
            return None, state
        scale = q.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        cross = ctx.role == "cross" or (not base.causal and base.q_len != base.kv_len)
        with full_precision(q), torch.no_grad():
            parts = list(self._lists(q, k, base, scale, cross))
        width = max(part.shape[-1] for part in parts)
        index = torch.cat([pad(part, (0, width - part.shape[-1]), value=-1) for part in parts], 2)
        return KeySelection(index, self.q_block), state

    def _lists(self, q: Tensor, k: Tensor, base: BaseMask, scale: float, cross: bool) -> Iterator[Tensor]:
        """``(B, heads, blocks, K)`` for some query blocks at a time."""
        heads = q.shape[1] if self.per_head else k.shape[1]
        step = max(1, SCORES // max(q.shape[0] * heads * base.kv_len * self.q_block, 1)) * self.q_block
        k = k.to(compute_dtype(k.dtype))
        for rows in torch.arange(base.q_len, device=q.device).split(step):
            keep = self._rows(q[:, :, rows].to(k.dtype), k, base, rows, scale, cross)
            keep = pad(keep, (0, 0, 0, -rows.shape[0] % self.q_block)).unflatten(2, (-1, self.q_block)).any(3)
            yield _ascending(keep)

    def _rows(self, q: Tensor, k: Tensor, base: BaseMask, rows: Tensor, scale: float, cross: bool) -> Tensor:
        """``(B, heads, rows, Nk)`` bool: what single rows keep."""
        key = torch.arange(base.kv_len, device=q.device)
        b = torch.arange(base.batch, device=q.device)[:, None, None]
        seen = base.allowed(b, torch.zeros_like(b), rows[:, None], key)  # (B or 1, rows, Nk)
        forced = ((base.rank >= 0) & (base.rank < self.sinks))[:, None]
        if not cross:
            own = (rows + base.shift)[:, None]
            forced = forced | ((key > own - self.local) & (key < own + self.local))
        forced = (forced & seen)[:, None]
        candidate = seen[:, None] & ~forced
        logits = pooled_scores(q, k, self.per_head) * scale
        if self.budget.mass is not None:
            share = pooled_scores(q, k) * scale
            share = torch.nan_to_num(torch.softmax(share.masked_fill(~seen[:, None], -torch.inf).double(), -1))
            share = share if self.per_head else share.unflatten(1, (k.shape[1], -1)).mean(2)
            room = self.budget.mass - (share * forced).sum(-1)
            return fill(share, candidate, share, room, 1.0) | forced
        allowed = seen.sum(-1)[:, None]
        if self.budget.density is not None:
            target = (self.budget.density * allowed.double()).round().clamp(min=1).long()
        else:
            target = allowed.clamp(max=self.budget.tokens)
        return top_tokens(logits, candidate, target - forced.sum(-1)) | forced


def top_tokens(scores: Tensor, candidate: Tensor, count: Tensor) -> Tensor:
    """Bool like ``scores`` ``(..., n)``: the ``count`` ``(...)`` best candidates; ties go to the lower index, no sorting of all."""
    candidate = candidate.expand(scores.shape)
    count = torch.minimum(count.expand(scores.shape[:-1]), candidate.sum(-1)).clamp(min=0)
    most = int(count.max()) if count.numel() else 0
    if most == 0:
        return torch.zeros_like(candidate)
    scores = scores.masked_fill(~candidate, -torch.inf)
    best = scores.topk(most, dim=-1).values
    least = best.gather(-1, (count - 1).clamp(min=0)[..., None]).masked_fill((count == 0)[..., None], torch.inf)
    above = scores > least
    level = (scores == least) & candidate
    room = (count - above.sum(-1))[..., None]
    return above | (level & (level.cumsum(-1) <= room))


def _ascending(keep: Tensor) -> Tensor:
    """``(..., K)`` positions of the True entries of ``(..., n)`` in rising order; −1 pads."""
    width = int(keep.sum(-1).max()) if keep.numel() else 0
    place = torch.where(keep, keep.cumsum(-1) - 1, width)
    out = torch.full((*keep.shape[:-1], width + 1), -1, device=keep.device)
    index = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
    return out.scatter_(-1, place, index)[..., :width]
