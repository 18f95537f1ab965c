"""How much the loss would change without a head, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.registry import register
from ..probe import Probe, Result, Site

if TYPE_CHECKING:
    from ...hf import AttentionEvent


@register("probe", "importance")
@dataclass(frozen=True)
class HeadImportance(Probe):
    """``Σ_d out·∂loss/∂out`` per head and token, ``(layer, head, token)``: the first-order change of the loss when the head's output
    at that token is scaled up by one, and minus the change when it is set to 0 (Michel et al. 2019, equation 2, before its
    absolute value and mean).

    Needs gradients: run the model with them and call ``loss.backward()`` before reading the result.
    """

    needs_blocks = False
    needs_gradients = True

    def start(self, site: Site) -> list[Tensor]:
        return []

    def call(self, event: AttentionEvent, site: Site, state: list[Tensor]) -> list[Tensor]:
        out = event.out
        into = torch.full(out.shape[:3], torch.nan, dtype=site.dtype, device=site.device)
        state.append(into)

        def take(gradient: Tensor) -> None:
            with torch.no_grad():
                into.copy_((out.detach().to(site.dtype) * gradient.to(site.dtype)).sum(-1))

        out.register_hook(take)
        return state

    def finish(self, site: Site, state: list[Tensor]) -> dict[str, Result]:
        values = torch.cat([site.zeros(site.first), *state], -1)
        values[..., : site.first] = torch.nan
        return {"": Result(values.masked_fill(~site.is_real()[:, None], torch.nan))}
