"""Heads, where paths between them end, and what patching each head alone does, with intervals over prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from .profile import numbers

Head = tuple[int, int]
"""(layer, head), both from 0."""


@dataclass(frozen=True, eq=False)
class HeadEffects:
    """What patching each head alone does.

    Attributes:
        method: "activation", "path" or "attribution". at: the place. receiver: what the path leads to, or "".
        change: ``(L, H, B)`` float64, patched − clean logit difference of every prompt; NaN where a layer has fewer heads.
        clean_difference, corrupt_difference: ``(B,)`` float64.
    """

    method: str
    at: str
    receiver: str
    change: Tensor
    clean_difference: Tensor
    corrupt_difference: Tensor

    @property
    def effect(self) -> Tensor:
        """``(L, H)`` E; NaN where the corrupted run is no worse or better than the clean one."""
        span = (self.corrupt_difference - self.clean_difference).mean()
        return torch.where(span == 0, torch.nan, self.change.mean(-1) / span)

    def interval(self, seed: int = 0, draws: int = 1000) -> tuple[Tensor, Tensor]:
        """``(L, H)`` ends of the 95 % bootstrap interval of E over prompts."""
        generator = torch.Generator().manual_seed(seed)
        prompts = self.change.shape[-1]
        weight = torch.zeros(draws, prompts, dtype=torch.float64)
        index = torch.randint(prompts, (draws, prompts), generator=generator)
        weight.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
        ratio = (self.change @ weight.T) / (weight @ (self.corrupt_difference - self.clean_difference))
        low, high = torch.quantile(ratio.nan_to_num(0.0), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=-1)
        return low, high

    def top(self, share: float) -> list[Head]:
        """The ``ceil(share · heads)`` heads with the largest |E|, best first; heads without any effect are left out."""
        size = self.change.mean(-1).abs().nan_to_num(0.0)
        count = max(1, -int(-share * int((~self.change[..., 0].isnan()).sum()) // 1))
        order = size.flatten().argsort(descending=True, stable=True)[:count]
        width = size.shape[1]
        return [(int(i) // width, int(i) % width) for i in order if size.flatten()[i] > 0]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; NaN becomes null."""
        low, high = self.interval()
        return {
            "method": self.method, "at": self.at, "receiver": self.receiver, "prompts": self.change.shape[-1],
            "clean_difference": float(self.clean_difference.mean()), "corrupt_difference": float(self.corrupt_difference.mean()),
            "effect": numbers(self.effect), "low": numbers(low), "high": numbers(high), "change": numbers(self.change.mean(-1)),
        }  # fmt: skip


@dataclass(frozen=True)
class Receivers:
    """Where paths end: the final residual, or queries, keys, values, or keys and values of heads.

    Attributes:
        kind: "final", "q", "k", "v" or "kv". heads: query heads; a grouped head's keys and values are those of its whole group.
    """

    kind: str = "final"
    heads: tuple[Head, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ("final", "q", "k", "v", "kv"):
            raise ConfigError(f"receivers of kind {self.kind!r}; expected 'final', 'q', 'k', 'v' or 'kv'.")
        if (self.kind == "final") == bool(self.heads):
            raise ConfigError(
                f"receivers of kind {self.kind!r} with heads {self.heads}; 'final' takes none, the others at least one."
            )

    def __str__(self) -> str:
        return (
            self.kind
            if not self.heads
            else f"{self.kind} of " + ", ".join(f"{layer}.{head}" for layer, head in self.heads)
        )
