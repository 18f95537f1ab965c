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
