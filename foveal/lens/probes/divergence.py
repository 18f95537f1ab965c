"""Where two inputs make a head attend differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ...core.errors import ConfigError, ShapeError, UnsupportedError
from ...core.registry import register
from ..blocks import Block
from ..probe import Probe, Result, Site

if TYPE_CHECKING:
    from ...hf import AttentionEvent

KINDS = ("js", "kl", "tv")


@register("probe", "divergence")
@dataclass(frozen=True)
class HeadDivergence(Probe):
    """How far the rows of two inputs of one length differ, ``(layer, head, token)``.

    The two inputs are neighbours in the batch: sequence 0 beside 1, 2 beside 3, and so on, so the weights of both exist at the
    same time and nothing of them is kept. Several pairs put ``pair`` where other probes have ``sequence``.

    Attributes:
        kind: ``"js"``, the Jensen–Shannon divergence in nats (0 to log 2); ``"kl"``, from the first to the second, in nats;
            ``"tv"``, half of the sum of absolute differences (0 to 1). Over the weights given a key.
    """

    kind: Literal["js", "kl", "tv"] = "js"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"HeadDivergence.kind is {self.kind!r}; expected one of {', '.join(map(repr, KINDS))}.")

    def start(self, site: Site) -> list[Tensor]:
        if site.batch % 2:
            raise ShapeError(
                f"the probe 'divergence' compares neighbours of the batch, which has {site.batch} sequence{'s' if site.batch > 1 else ''}; "
                "pass two inputs of equal length as one batch."
            )
        return []

    def call(self, event: AttentionEvent, site: Site, state: list[Tensor]) -> list[Tensor]:
        if event.call.base.lo.shape[0] > 1:
            raise UnsupportedError(
                "the probe 'divergence' compares row by row, and the sequences of this batch have masks of their own (packed documents or "
                "attention chunks); pass two inputs without them."
            )
        state.append(site.zeros(site.end - site.seen))
        return state

    def see(self, block: Block, site: Site, state: list[Tensor]) -> None:
        if block.b % 2:
            return
        value = self._between(block, block.twin(block.b + 1))
        state[-1][block.b, block.heads, block.rows] = value

    def _between(self, one: Block, other: Block) -> Tensor:
        p = one.weights / one.on_keys[..., None]
        q = other.weights / other.on_keys[..., None]
        if self.kind == "tv":
            return (p - q).abs().sum(-1) / 2
        if self.kind == "kl":
            log_p = one.log_weights - one.on_keys.log()[..., None]
            log_q = other.log_weights - other.on_keys.log()[..., None]
            return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp_(min=0)
        middle = (p + q) / 2
        halves = torch.special.xlogy(p, p) + torch.special.xlogy(q, q)
        return (halves / 2 - torch.special.xlogy(middle, middle)).sum(-1).clamp_(min=0)

    def finish(self, site: Site, state: list[Tensor]) -> dict[str, Result]:
        values = torch.cat([site.zeros(site.first), *state], -1)[0::2]
        values[..., : site.first] = torch.nan
        real = site.is_real()
        return {"": Result(values.masked_fill(~(real[0::2] & real[1::2])[:, None], torch.nan))}
