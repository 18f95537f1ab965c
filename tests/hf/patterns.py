"""Patterns that only tests use: what they do is obvious, and what they read is extreme."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveal.core.context import SelectContext, State
from foveal.core.layouts import KeySelection, Layout
from foveal.patterns import LookAhead, Pattern

BLOCK = 128


@dataclass(frozen=True)
class Reading(Pattern):
    """Each row keeps itself and one earlier key, chosen by the sum of the queries that it may read."""

    registered_name: ClassVar[str] = "test_reading"
    reads: LookAhead = "none"

    @property
    def look_ahead(self) -> LookAhead:
        return self.reads

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        rows = torch.arange(ctx.base.q_len)
        end = {"none": rows + 1, "block": (rows // BLOCK + 1) * BLOCK, "prefill": rows * 0 + ctx.base.q_len}[self.reads]
        running = q.double().sum((1, 3)).cumsum(-1)  # (B, Nq)
        read = running[:, end.clamp(max=ctx.base.q_len) - 1]
        own = rows + ctx.base.shift
        other = (read.mul(1e6).round().long().abs() % (own + 1)).where(own > 0, 0)
        index = torch.stack([own.expand_as(other), other.where(other != own, -1)], -1)
        return KeySelection(index[:, None], 1), state


def reading(how_far: str) -> Reading:
    """The pattern for one degree of look-ahead."""
    return Reading(how_far)  # type: ignore[arg-type]


SMALL = 4


@dataclass(frozen=True)
class BlockSums(Pattern):
    """Each row keeps its own block of four keys and the earlier block whose keys sum to the best match.

    The sums are the state: with ``remember`` they grow with the cache, without it they are computed from all keys each
    time. Both must choose alike, whatever happens to the cache in between.
    """

    registered_name: ClassVar[str] = "test_block_sums"
    log: ClassVar[list[str]] = []
    remember: bool = True

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        blocks = -(-k.shape[2] // SMALL)
        full = k.new_zeros(*k.shape[:2], blocks, k.shape[-1])
        known = 0
        if state is not None and self.remember:
            old, known = state
            full[:, :, : old.shape[2]] = old
        self.log.append("continued" if known else "rebuilt")
        full.index_add_(2, torch.arange(known, k.shape[2]) // SMALL, k[:, :, known:])
        group = q.shape[1] // k.shape[1]
        own = torch.arange(ctx.base.q_len) + ctx.base.shift
        score = q.unflatten(1, (-1, group)).sum(2) @ full.mT  # (B, Hkv, Nq, blocks)
        earlier = torch.arange(blocks) < (own // SMALL)[:, None]
        best = score.masked_fill(~earlier, -torch.inf).argmax(-1, keepdim=True)
        inside = torch.arange(SMALL)
        far = (best * SMALL + inside).where(earlier.any(-1)[:, None], -1)
        near = ((own // SMALL * SMALL)[:, None] + inside).expand_as(far)
        near = near.where(near <= own[:, None], -1)
        state = (full, k.shape[2]) if self.remember else None
        return KeySelection(torch.cat([near, far], -1), 1), state
