"""Every figure of the lens in float64, from the full matrix of weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveal.core.base_mask import BaseMask


@dataclass
class Brute:
    weights: Tensor  # (B, H, Nq, Nk) share of a row's total, learned sink included in the total
    given_keys: Tensor  # the same, over keys alone
    learned: Tensor  # (B, H, Nq)
    seen: Tensor  # (B, Nq, Nk)
    real: Tensor  # (B, Nq)
    base: BaseMask

    def mean(self, values: Tensor, keep: Tensor | None = None) -> Tensor:
        """(B, H, Nq) -> (H,) over real rows."""
        keep = self.real if keep is None else self.real & keep
        return (values * keep[:, None]).sum((0, 2)) / keep.sum()

    def values(self, per_row: Tensor, head: int) -> Tensor:
        return per_row[:, head][self.real]

    def sink(self, sinks: int) -> Tensor:
        rank = self.base.rank.expand(self.weights.shape[0], -1)
        return ((rank >= 0) & (rank < sinks))[:, None, None, :]

    def away(self) -> Tensor:
        own = torch.arange(self.base.q_len) + self.base.shift
        return own[:, None] - torch.arange(self.base.kv_len)

    def window(self, window: int) -> Tensor:
        away = self.away()
        return (away < window) & (away > (-1 if self.base.causal else -window))

    def entropy(self) -> Tensor:
        return -torch.special.xlogy(self.given_keys, self.given_keys).sum(-1)

    def allowed(self) -> Tensor:
        return self.seen.sum(-1)

    def keys_for(self, mass: float = 0.9) -> Tensor:
        found = self.given_keys.sort(-1, descending=True).values.cumsum(-1)
        return ((found < mass - 1e-6).sum(-1) + 1).clamp(max=self.base.kv_len)


def brute_force(
    q: Tensor, k: Tensor, base: BaseMask, *, scale: float | None = None, softcap: float | None = None,
    bias: Tensor | None = None, sink_logits: Tensor | None = None, role: str = "self",
) -> Brute:  # fmt: skip
    batch, heads = q.shape[:2]
    q, k = q.double(), k.double().repeat_interleave(heads // k.shape[1], 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        reach = bias.shape[1] // 2
        own = torch.arange(base.q_len) + base.shift
        column = (torch.arange(base.kv_len) - own[:, None]).clamp(-reach, reach) + reach
        logits = logits + bias.double()[:, column]
    seen = base.dense(batch)
    weights = torch.where(seen[:, None], logits.exp(), 0.0)
    on_keys = weights.sum(-1)
    learned = (
        torch.zeros_like(on_keys)
        if sink_logits is None
        else sink_logits.double().exp()[None, :, None].expand_as(on_keys)
    )
    real = seen.any(-1)
    if role == "self" and base.valid is not None:
        own = torch.arange(base.q_len) + base.shift
        real = real & base.valid.expand(batch, -1)[:, own]
    total = on_keys + learned
    total = torch.where(total > 0, total, 1.0)
    given = weights / torch.where(on_keys > 0, on_keys, 1.0)[..., None]
    return Brute(weights / total[..., None], given, learned / total, seen, real, base)
