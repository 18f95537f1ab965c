"""Norms of keys and values: sinks have long keys and short values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.registry import register
from ..probe import Probe, Result, Site

if TYPE_CHECKING:
    from ...hf import AttentionEvent


@register("probe", "norms")
@dataclass(frozen=True)
class KeyValueNorms(Probe):
    """``norms.key`` and ``norms.value``: Euclidean norms after the rotary embedding, ``(layer, head, token)``, head a key head."""

    needs_blocks = False

    def start(self, site: Site) -> list[Tensor]:
        return []

    def call(self, event: AttentionEvent, site: Site, state: list[Tensor]) -> list[Tensor]:
        base = event.call.base
        new = slice(base.shift, base.shift + base.q_len)
        pair = [x[:, :, new].detach().to(site.dtype).norm(dim=-1) for x in (event.call.k, event.call.v)]
        state.append(torch.stack(pair))
        return state

    def finish(self, site: Site, state: list[Tensor]) -> dict[str, Result]:
        values = torch.nn.functional.pad(torch.cat(state, -1), (site.first, 0), value=torch.nan)
        values = values.masked_fill(~site.is_real()[:, None], torch.nan)
        return {"key": Result(values[0]), "value": Result(values[1])}
