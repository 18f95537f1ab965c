"""Block top-k: keep the key blocks whose mean key fits the query best (Kinetics, arXiv 2506.05333, block top-k)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import EMPTY, BaseMask
from ..core.budget import Budget
from ..core.context import SelectContext, State
from ..core.layouts import KeySelection, Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..kernels.pooling import (
    BlockSums,
    absorb,
    diagonal_tiles,
    fill,
    filled_keys,
    full_precision,
    keys_before,
    mean_rows,
    pooled_scores,
    real_rows,
    sink_tiles,
    tile_area,
)
from .base import LookAhead, Pattern
from .documents import documents, tile_layout

_OVERSHOOT = {"tokens": 0.0, "density": 0.5, "mass": 1.0}


@register("pattern", "block_topk")
@dataclass(frozen=True)
class BlockTopK(Pattern):
    """Each query block keeps the key blocks with the largest product of mean query and mean key.

    Attributes:
        budget: keys kept, counting sinks and local keys. ``tokens``: at most so many keys per row on average over the
            query block; ``density``: the nearest share of the pairs that the base mask allows this query block;
            ``mass``: the smallest set of blocks that holds this share of the softmax over blocks, where a block's logit
            is ``scale · q̄·k̄ + ln(keys seen per row)``.
        q_block: rows that share one choice in prefill. Their mean query is known only at the block's end, so
            ``look_ahead`` is ``"block"`` (``"none"`` for 1).
        kv_block: keys per block.
        sinks: first tokens of each sequence that stay visible: their whole blocks in prefill, the tokens in decoding.
        local: tokens before the query that stay visible, counting the query itself. Key blocks that overlap the query
            block stay in any case, so every row sees itself.
        per_head: choose for each query head; otherwise once per KV group, by the mean over its query heads.

    Sinks and local keys are kept even when they alone exceed the budget. In decoding the open block and ``local`` form the
    tail, and whole blocks before it compete. The state, running sums of key blocks, costs O(new keys) per call.
    """

    budget: Budget
    q_block: int = 128
    kv_block: int = 64
    sinks: int = 4
    local: int = 1
    per_head: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for name, low in (("q_block", 1), ("kv_block", 1), ("sinks", 0), ("local", 0)):
            check_range(self, name, low=low)

    @property
    def look_ahead(self) -> LookAhead:
        return "block" if self.q_block > 1 else "none"

    @property
    def _everything(self) -> bool:
        return 1.0 in (self.budget.density, self.budget.mass)

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask`` for prefill, a ``KeySelection`` for one new token; None when the budget holds everything."""
        with full_precision(q):
            return self._select(q, k, ctx, state)

    def _select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State) -> tuple[Layout | None, State]:
        base = ctx.base
        if self._everything or base.q_len == 0 or base.kv_len == 0:
            return None, state
        sums = None if documents(base) else absorb(state, k, base, self.kv_block)
        if self.budget.tokens is not None and self.budget.tokens >= filled_keys(base):
            return None, sums
        scale = 1.0 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale
        if base.q_len == 1 and base.causal:
            assert sums is not None
            return self._decode(q, k, base, scale, sums), sums

        def keep(q: Tensor, k: Tensor, part: BaseMask) -> Tensor:
            return self._tiles(
                q,
                k,
                part,
                scale,
                sums if sums is not None else absorb(None, k, part, self.kv_block),
                ctx.role == "cross",
            )

        return tile_layout(q, k, base, (self.q_block, self.kv_block), keep), sums

    def _tiles(self, q: Tensor, k: Tensor, base: BaseMask, scale: float, sums: BlockSums, cross: bool) -> Tensor:
        area = tile_area(base, self.q_block, self.kv_block)[:, None]  # (B or 1, 1, nqb, nkb)
        reach = area > EMPTY
        keys = torch.nn.functional.pad(sums.means, (0, 0, 0, area.shape[-1] - sums.sums.shape[2]))
        mean_q = mean_rows(q, self.q_block, real_rows(base))
        scores = pooled_scores(mean_q, keys, self.per_head) * scale
        forced = sink_tiles(base, self.kv_block, self.sinks)[:, None, None]
        if not cross:
            forced = forced | diagonal_tiles(base, self.q_block, self.kv_block, self.local)
        forced = forced & reach
        rows = (area.sum(-1) > 0) * _rows(base, self.q_block)[:, None]
        allowed = area.sum(-1).double()
        if self.budget.mass is None:
            target = (
                allowed * self.budget.density
                if self.budget.density
                else torch.minimum(allowed, rows * float(self.budget.tokens or 0))
            )
            room = target - (area * forced).sum(-1)
            cost = area
        else:
            scores = self._own_keys_only(scores, mean_q, k, base, scale)
            logits = scores + torch.log(area / rows.clamp(min=1)[..., None])
            cost = torch.nan_to_num(torch.softmax(logits.masked_fill(~reach, -torch.inf).double(), -1))
            room = self.budget.mass - (cost * forced).sum(-1)
        keep = fill(scores, reach & ~forced, cost, room, _OVERSHOOT[_kind(self.budget)]) | forced
        blind = reach.any(-1, keepdim=True) & ~keep.any(
            -1, keepdim=True
        )  # cross-attention under a tiny budget: the best block
        best = torch.where(reach, scores, -torch.inf).argmax(-1, keepdim=True)
        return keep | torch.zeros_like(keep).scatter(-1, best, blind)

    def _own_keys_only(self, scores: Tensor, mean_q: Tensor, k: Tensor, base: BaseMask, scale: float) -> Tensor:
        """Score each query block's last key block by the keys up to the block's own end: no key after it may tip a mass."""
        if not base.causal:
            return scores
        first = torch.arange(scores.shape[2], device=k.device) * self.q_block + base.shift
        end = (first + self.q_block).clamp(max=base.shift + base.q_len)
        last = torch.div(end - 1, self.kv_block, rounding_mode="floor")
        index = last[:, None] * self.kv_block + torch.arange(self.kv_block, device=k.device)
        inside = (index < end[:, None])[None]
        index = index.clamp(max=base.kv_len - 1)
        if base.valid is not None:
            inside = inside & base.valid[:, index]
        picked = torch.where(inside[:, None, ..., None], k[:, :, index].to(mean_q.dtype), 0.0).sum(3)
        mean = picked / inside.sum(-1).clamp(min=1)[:, None, :, None]
        mean = mean.repeat_interleave(mean_q.shape[1] // mean.shape[1], 1)
        own = (mean_q * mean).sum(-1) * scale
        if scores.shape[1] != own.shape[1]:
            own = own.unflatten(1, (scores.shape[1], -1)).mean(2)
        return scores.scatter(-1, last[None, None, :, None].expand(*scores.shape[:3], 1), own[..., None])

    def _decode(self, q: Tensor, k: Tensor, base: BaseMask, scale: float, sums: BlockSums) -> KeySelection:
        own, size = base.shift, self.kv_block
        before = keys_before(base)
        lo, hi = base.lo[:, 0], base.hi[:, 0]
        tail = (
            max(0, min(own // size * size, own - self.local + 1)) // size * size
        )  # blocks from here on are kept whole
        start = torch.arange(tail // size, device=k.device) * size
        rows = torch.arange(max(before.shape[0], lo.shape[0]), device=k.device)
        before, lo, hi = before.expand(len(rows), -1), lo.expand(len(rows)), hi.expand(len(rows))
        edge = (start[:, None] + torch.tensor([0, size], device=k.device))[None].clamp(
            lo[:, None, None], hi[:, None, None]
        )
        real = before.gather(1, edge[..., 1]) - before.gather(1, edge[..., 0])  # keys of the block that the row may see
        candidate = real > 0
        scores = pooled_scores(q.to(sums.sums.dtype), sums.means[:, :, : len(start)], self.per_head)[:, :, 0] * scale
        sink = self._sinks(base, tail)
        held = torch.zeros_like(real).scatter_add_(
            1, sink.clamp(min=0).expand(len(rows), -1) // size, (sink >= 0).long().expand(len(rows), -1)
        )
        real = real - held  # sinks stay anyway: their block costs its other keys alone
        allowed = before[rows, hi] - before[rows, lo]
        if self.budget.mass is None:
            target = (
                self.budget.density * allowed if self.budget.density else allowed.clamp(max=self.budget.tokens or 0)
            )
            near = before[:, own + 1] - torch.maximum(before[:, tail], before[rows, lo])
            room = (target - near - (sink >= 0).sum(-1))[:, None]
            cost = real[:, None]
        else:
            room, cost = self._decode_mass(q, k, real, held, sink, tail, sums, scale)
        chosen = fill(scores, candidate[:, None], cost, room, _OVERSHOOT[_kind(self.budget)])  # (B, heads, blocks)
        return KeySelection(_decode_list(chosen, sink, tail, own, size)[:, :, None], 1)

    def _sinks(self, base: BaseMask, tail: int) -> Tensor:
        """``(B or 1, ≤ sinks)`` key indices of the first tokens before the tail that the row may see; −1 pads."""
        hit = (
            (base.rank[:, :tail] >= 0)
            & (base.rank[:, :tail] < self.sinks)
            & (torch.arange(tail, device=base.device) >= base.lo[:, :1])
        )
        if base.valid is not None:
            hit = hit & base.valid[:, :tail]
        width = int(hit.sum(-1).max()) if hit.numel() else 0
        index = hit.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :width]
        return torch.where(hit.gather(1, index), index, -1)

    def _decode_mass(
        self, q: Tensor, k: Tensor, real: Tensor, held: Tensor, sink: Tensor, tail: int, sums: BlockSums, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Room and cost in mass: softmax over competing blocks without their sinks, tail blocks and single sink tokens."""
        q, first = q.to(sums.sums.dtype), tail // self.kv_block
        at = sink.clamp(min=0).expand(k.shape[0], -1)[:, None, :, None]
        early = k.gather(2, at.expand(-1, k.shape[1], -1, k.shape[3])).to(q.dtype)
        lone = torch.where((sink >= 0)[:, None, :, None], early, 0.0)
        others = sums.sums[:, :, :first].scatter_add(2, (at // self.kv_block).expand_as(lone), -lone)
        means = others / (sums.counts[:, :first] - held).clamp(min=1)[:, None, :, None]

        def mass(keys: Tensor, counts: Tensor) -> Tensor:
            logits = pooled_scores(q, keys, self.per_head)[:, :, 0] * scale + torch.log(counts.double())[:, None]
            return logits.double()

        parts = mass(means, real), mass(sums.means[:, :, first:], sums.counts[:, first:]), mass(early, sink >= 0)
        share = torch.softmax(torch.cat(parts, -1), -1)
        assert self.budget.mass is not None
        return self.budget.mass - share[..., first:].sum(-1), share[..., :first]


def _kind(budget: Budget) -> str:
    return "tokens" if budget.tokens is not None else "density" if budget.density is not None else "mass"


def _rows(base: BaseMask, q_block: int) -> Tensor:
    """``(B or 1, nqb)`` rows per query block that are no padding."""
    real = real_rows(base)
    return torch.nn.functional.pad(real.long(), (0, -base.q_len % q_block)).unflatten(-1, (-1, q_block)).sum(-1)


def _decode_list(chosen: Tensor, sink: Tensor, tail: int, own: int, size: int) -> Tensor:
    """``(B, heads, K)``: sinks outside the chosen blocks, the chosen blocks, the tail, in rising order; −1 pads."""
    batch, heads, blocks = chosen.shape
    most = int(chosen.sum(-1).max()) if blocks else 0
    index = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    picked = index[..., None] * size + torch.arange(size, device=chosen.device)
    picked = torch.where(chosen.gather(-1, index)[..., None], picked, -1).flatten(2)
    sink = sink[:, None].expand(batch, heads, -1)
    if blocks:
        twice = chosen.gather(-1, sink.clamp(min=0) // size) & (sink >= 0)
        sink = torch.where(twice, -1, sink)
    near = torch.arange(tail, own + 1, device=chosen.device).expand(batch, heads, -1)
    return torch.cat([sink, picked, near], -1)
