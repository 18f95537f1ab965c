"""The training-free block variants of DHSA (arXiv 2510.24606, v2): ``a``, ``vs``, ``vsb``, ``topk``.

Each query head keeps K key blocks per query block. Some are forced: the sequence's first block (not in ``topk``) and the
diagonal band, all key blocks that overlap the query block. The others are the best by a score that differs by variant:

* ``a``, ``topk``: mean query · mean key.
* ``vs``: softmax weights of the last ``q_block`` rows, summed per key (*vertical*) and per distance (*slash*); the best
  half of ``K · kv_block`` columns and of distances scatter their mass to the key blocks that they touch.
* ``vsb``: the same with the mean of those rows against mean keys, so that memory is O(N / kv_block).

``literal`` follows the authors' released code instead: only the last key block of each query block is forced in ``a`` and
``vs`` and nothing in ``topk``, which also ranks future blocks; a density is a share of all N keys; the zero rows that fill
the last block count in its mean; ``vsb`` scatters raw logits, so that a block chosen with a negative logit ranks below one
that was not chosen at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import EMPTY, BaseMask
from ..core.budget import Budget
from ..core.errors import UnsupportedError
from ..kernels.call import compute_dtype
from ..kernels.pooling import (
    block_sums,
    diagonal_tiles,
    fill,
    filled_keys,
    mean_rows,
    pooled_scores,
    real_rows,
    sink_tiles,
    tile_area,
)

BlockVariant = Literal["a", "vs", "vsb", "topk"]


@dataclass(frozen=True)
class BlockRule:
    """How to choose tiles; ``keep`` does it for one unpacked sequence.

    Attributes:
        variant, budget, literal: see the module.
        q_block, kv_block: rows and keys per tile.
        scale: factor of q·k in the softmax of ``vs`` and ``vsb``.
    """

    variant: BlockVariant
    budget: Budget
    q_block: int
    kv_block: int
    scale: float
    literal: bool = False

    def keep(self, q: Tensor, k: Tensor, base: BaseMask) -> Tensor:
        """``(B, H, nqb, nkb)`` bool: the tiles kept."""
        if not base.causal and self.variant in ("vs", "vsb"):
            raise UnsupportedError(
                f"dhsa with variant {self.variant!r} ranks distances to earlier keys and this attention is bidirectional; use variant='a' or block_topk."
            )
        reach = base.block_map(self.q_block, self.kv_block) > EMPTY  # (B or 1, nqb, nkb)
        if self.variant == "topk" and self.literal:
            return self._topk_of_everything(q, k, base, reach)
        forced = self._forced(base, reach)
        last = self._last_block(base)
        budget = self._blocks(base, reach, forced, last)  # (B or 1,)
        if self.variant == "vs":
            scores = self._vertical_slash(q, k, base, budget)
        elif self.variant == "vsb":
            scores = self._vertical_slash_blocks(q, k, base, budget)
        else:
            scores = self._means(q, k, base)
        room = budget[:, None] - forced.sum(-1)
        keep = (
            fill(scores, (reach & ~forced)[:, None], torch.ones((), device=q.device), room[:, None]) | forced[:, None]
        )
        dense = self._dense(reach.sum(-1), last, budget[:, None])
        return keep | (reach & dense[..., None])[:, None]

    # --- how many, and which in any case ---------------------------------------------------------------------------

    def _forced(self, base: BaseMask, reach: Tensor) -> Tensor:
        band = diagonal_tiles(base, self.q_block, self.kv_block)[None]
        if self.literal and self.variant in ("a", "vs"):
            index = torch.arange(reach.shape[-1], device=reach.device)
            band = index == torch.where(reach, index, -1).amax(-1, keepdim=True)
        if self.variant != "topk":
            band = band | sink_tiles(base, self.kv_block, 1)[:, None]
        return band & reach

    def _last_block(self, base: BaseMask) -> Tensor:
        """``(B or 1, nqb)`` bool: the query block that holds the last row that is no padding."""
        u = torch.arange(-(-base.q_len // self.q_block), device=base.device)
        return u == torch.div(last_row(base), self.q_block, rounding_mode="floor")[:, None]

    def _dense(self, reachable: Tensor, last: Tensor, blocks: Tensor) -> Tensor:
        """Query blocks that keep everything: those with no more key blocks than the budget; in ``vs`` and ``vsb`` also
        the first ``⌈K·kv_block/q_block⌉`` and the last one."""
        dense = reachable <= blocks
        if self.variant in ("vs", "vsb"):
            prefix = -(-blocks * self.kv_block // self.q_block) * self.q_block
            dense = dense | last | (reachable * self.kv_block <= prefix)
        return dense

    def _blocks(self, base: BaseMask, reach: Tensor, forced: Tensor, last: Tensor) -> Tensor:
        """``(B or 1,)`` K, key blocks per query block."""
        unit = math.lcm(self.q_block, self.kv_block)
        keys = -(-filled_keys(base) // unit) * unit  # as if padded to whole blocks
        if self.budget.tokens is not None or self.literal:
            tokens = self.budget.tokens if self.budget.tokens is not None else (self.budget.density or 0.0) * keys
            tokens = keys if tokens >= filled_keys(base) else tokens  # a budget of the whole length is dense
            return torch.full((1,), max(1, int(tokens / self.kv_block + 1e-9)), device=reach.device)
        area = tile_area(base, self.q_block, self.kv_block)
        reachable, must = reach.sum(-1), forced.sum(-1)
        allowed, sure = area.sum(-1).double(), (area * forced).sum(-1).double()
        each = (allowed - sure) / (reachable - must).clamp(min=1)  # pairs of a tile that competes
        choices = torch.arange(1, int(reachable.max()) + 1 if reachable.numel() else 1, device=reach.device)[
            None, :, None
        ]
        pairs = torch.minimum(sure[:, None] + (choices - must[:, None]).clamp(min=0) * each[:, None], allowed[:, None])
        pairs = torch.where(self._dense(reachable[:, None], last[:, None], choices), allowed[:, None], pairs).sum(-1)
        off = (pairs - (self.budget.density or 0.0) * allowed.sum(-1, keepdim=True)).abs()
        return off.argmin(-1) + 1 if off.shape[-1] else torch.ones_like(off[:, :0].sum(-1)).long()

    # --- scores ----------------------------------------------------------------------------------------------------

    def _means_of(self, x: Tensor, block: int, keep: Tensor) -> Tensor:
        if self.literal:
            return block_sums(x, block, keep) / block
        return mean_rows(x, block, keep)

    def _key_means(self, k: Tensor, base: BaseMask) -> Tensor:
        keep = torch.arange(base.kv_len, device=k.device)[None] < filled_keys(base)
        return self._means_of(k, self.kv_block, keep if base.valid is None else keep & base.valid)

    def _means(self, q: Tensor, k: Tensor, base: BaseMask) -> Tensor:
        return pooled_scores(self._means_of(q, self.q_block, real_rows(base)), self._key_means(k, base))

    def _topk_of_everything(self, q: Tensor, k: Tensor, base: BaseMask, reach: Tensor) -> Tensor:
        candidate = reach.any(1, keepdim=True)  # any block that some row may see, future or not
        budget = self._blocks(base, reach, reach, self._last_block(base))
        return fill(self._means(q, k, base), candidate[:, None], torch.ones((), device=q.device), budget[:, None, None])

    def _vertical_slash(self, q: Tensor, k: Tensor, base: BaseMask, budget: Tensor) -> Tensor:
        batch, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
        rows = last_row(base)[:, None] + torch.arange(1 - min(self.q_block, base.q_len), 1, device=q.device)
        nkb = -(-base.kv_len // self.kv_block)
        keys = torch.arange(base.kv_len, device=q.device)
        out = torch.empty(batch, heads, -(-base.q_len // self.q_block), nkb, dtype=torch.float64, device=q.device)
        for b in range(batch):  # one row of the batch and one KV head at a time: memory O(q_block · N)
            some = rows[b if rows.shape[0] > 1 else 0]
            of = torch.full((), b, device=q.device)
            seen = base.allowed(of[None, None], torch.zeros_like(of)[None, None], some[:, None], keys[None])
            tokens = int(budget[b if budget.shape[0] > 1 else 0]) * self.kv_block
            for h, group in enumerate(torch.arange(heads, device=q.device).view(kv_heads, -1)):
                lines = q[b, group][:, some.clamp(min=0)].to(compute_dtype(q.dtype))
                weights = torch.softmax(
                    (lines @ k[b, h].to(lines.dtype).T * self.scale).masked_fill(~seen, -torch.inf), -1
                )
                weights = weights.masked_fill(~seen, 0.0)
                vertical = best(weights.sum(1), tokens // 2)
                slash = best(by_distance(weights, int(some[0]) + base.shift), tokens - tokens // 2)
                columns = pad(vertical, (0, -base.kv_len % self.kv_block)).unflatten(-1, (-1, self.kv_block)).sum(-1)
                out[b, group] = columns[:, None].double() + self._shifted(slash, base, self.kv_block)
        return out

    def _vertical_slash_blocks(self, q: Tensor, k: Tensor, base: BaseMask, budget: Tensor) -> Tensor:
        rows = last_row(base)[:, None] + torch.arange(1 - min(self.q_block, base.q_len), 1, device=q.device)
        index = rows.clamp(min=0).expand(q.shape[0], -1)
        lines = q.gather(2, index[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])).to(compute_dtype(q.dtype))
        real = ((rows >= 0) & real_rows(base).expand(rows.shape[0], -1).gather(1, rows.clamp(min=0)))[:, None, :, None]
        mean = torch.where(real, lines, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
        logits = pooled_scores(mean, self._key_means(k, base))[:, :, 0] * self.scale  # (B, H, nkb)
        final = torch.div(last_row(base) + base.shift, self.kv_block, rounding_mode="floor")[:, None]
        block = torch.arange(logits.shape[-1], device=q.device)
        seen = (base.block_map(self.q_block, self.kv_block) > EMPTY) & self._last_block(base)[..., None]
        seen = seen.any(1) & (block <= final)  # (B or 1, nkb)
        hidden = logits.masked_fill(~seen[:, None], -torch.inf).double()
        weights = hidden if self.literal else torch.nan_to_num(torch.softmax(hidden, -1))
        half = torch.div(budget, 2, rounding_mode="floor")
        vertical = best(weights, half[:, None])
        distance = (final - block).clamp(min=0)[:, None].expand(weights.shape)
        slash = torch.zeros_like(weights).scatter_add(-1, distance, best(weights, (budget - half)[:, None]))
        return vertical[:, :, None] + self._shifted(slash, base, 1)

    def _shifted(self, slash: Tensor, base: BaseMask, unit: int) -> Tensor:
        """``(..., nqb, nkb)``: for every tile the mass of the distances whose shifted query block overlaps the key block.

        ``slash`` is ``(..., n)`` by distance, in keys (``unit = kv_block``) or, for ``unit = 1``, in key blocks.
        """
        u = torch.arange(-(-base.q_len // self.q_block), device=slash.device)
        first = u * self.q_block + base.shift
        final = torch.minimum(first + self.q_block, torch.full_like(first, base.shift + base.q_len)) - 1
        if unit == 1:
            first, final = first // self.kv_block, final // self.kv_block
        start = torch.arange(-(-base.kv_len // self.kv_block), device=slash.device) * unit
        near = (first[:, None] - (start + unit - 1)).clamp(min=0)
        far = (final[:, None] - start).clamp(max=slash.shape[-1] - 1)
        if unit == 1:  # few distances per tile: add them one by one, so that equal masses stay exactly equal
            steps = [far - step for step in range(int((final - first).max()) + 1)]
            return sum((torch.where(at >= near, slash[..., at.clamp(min=0)], 0.0) for at in steps), slash.new_zeros(()))
        near, after = near.clamp(max=slash.shape[-1]), (far + 1).clamp(min=0)
        total, some = pad(slash.double().cumsum(-1), (1, 0)), pad((slash != 0).cumsum(-1), (1, 0))
        touched = (far >= near) & (
            some[..., after] > some[..., near]
        )  # without it, rounding would rank untouched tiles
        return torch.where(touched, total[..., after] - total[..., near], 0.0)


def last_row(base: BaseMask) -> Tensor:
    """``(B or 1,)`` index of the last row that is no padding."""
    at = torch.arange(base.q_len, device=base.device)
    return torch.where(real_rows(base), at, -1).amax(-1).clamp(min=0)


def best(values: Tensor, count: Tensor | int) -> Tensor:
    """``values`` with everything but the ``count`` largest along the last axis (and −inf) set to zero."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    limit = count[..., None] if isinstance(count, Tensor) else count
    top = torch.arange(values.shape[-1], device=values.device) < limit
    chosen = torch.zeros_like(values, dtype=torch.bool).scatter(-1, order, top.expand(values.shape))
    return torch.where(chosen & torch.isfinite(values), values, 0.0)


def by_distance(weights: Tensor, first: int) -> Tensor:
    """Sum ``(..., R, N)`` weights of consecutive rows, the first at key index ``first``, over each distance ``row − key``.

    Returns ``(..., N)``: entry d is distance d; weights of later keys must be zero.
    """
    rows, keys = weights.shape[-2:]
    skew = pad(weights.flip(-2), (0, rows)).flatten(-2)[..., : rows * (keys + rows - 1)]
    along = skew.unflatten(-1, (rows, keys + rows - 1)).sum(-2)  # column t holds distance first + rows − 1 − t
    at = first + rows - 1 - torch.arange(keys, device=weights.device)
    return torch.where((at >= 0) & (at < along.shape[-1]), along[..., at.clamp(0, along.shape[-1] - 1)], 0.0)
