"""Scale or ablate attention heads: multiply their outputs before the output projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..hf.families import AttentionSite
from ..hf.interventions import Act, Moment

if TYPE_CHECKING:
    from ..hf import Handle


@dataclass(frozen=True)
class HeadScale:
    """Multiply the outputs of chosen heads by one number at every position; 0 ablates them.

    Exactly the same as multiplying the columns of the output projection that read these heads.

    Attributes:
        heads: layer → query heads. factor: what they are multiplied by.

    Raises:
        ConfigError: heads that are not given as a mapping of layers to lists.
    """

    heads: Mapping[int, Sequence[int]]
    factor: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.heads, Mapping) or any(isinstance(v, int) for v in self.heads.values()):
            raise ConfigError(
                f"heads is {self.heads!r}; expected a mapping of layer to head numbers such as {{3: [0, 2]}}."
            )

    def on(self, handle: Handle) -> Act:
        """Check layers and heads against the model, and start."""
        counts = head_counts(handle)
        for layer, heads in self.heads.items():
            if layer not in counts:
                raise ConfigError(
                    f"heads names layer {layer}; {type(handle.model).__name__} has layers 0 to {len(counts) - 1}."
                )
            wrong = [h for h in heads if not 0 <= h < counts[layer]]
            if wrong:
                raise ConfigError(
                    f"heads names head {wrong[0]} of layer {layer}, which has heads 0 to {counts[layer] - 1}."
                )
        return _Scaling(self)


class _Scaling(Act):
    def __init__(self, what: HeadScale) -> None:
        self.what, self.calls = what, 0

    def rewrite(self, moment: Moment, out: Tensor) -> Tensor:
        heads = self.what.heads.get(moment.ctx.layer_index)
        if not heads:
            return out
        self.calls += 1
        return scale_heads(out, torch.tensor(list(heads), device=out.device), self.what.factor)

    def report(self) -> dict[str, Any]:
        return {"intervention": "HeadScale", "fired": self.calls > 0, "factor": self.what.factor, "calls": self.calls}


def scale_heads(out: Tensor, heads: Tensor, factor: float) -> Tensor:
    """``(B, H, N, Dv)`` with ``heads`` ``(n,)`` multiplied by ``factor``, in float32 at least; a factor of 1 changes no bit."""
    factors = torch.ones(out.shape[1], dtype=torch.promote_types(out.dtype, torch.float32), device=out.device)
    factors[heads] = factor
    return (out * factors[None, :, None, None]).to(out.dtype)


def head_counts(handle: Handle) -> dict[int, int]:
    """Query heads of each self-attention layer."""
    own: dict[int, AttentionSite] = {site.index: site for site in handle.sites.values() if site.index >= 0}
    counts = {layer: head_count(site) for layer, site in own.items()}
    if handle.shared:
        counts = {layer: counts[min(own)] for layer in range(handle.num_layers)}
    return counts


def head_count(site: AttentionSite) -> int:
    """Query heads of one attention module."""
    for holder in (site.module, getattr(site.module, "config", None)):
        for name in ("num_heads", "num_attention_heads", "n_head"):
            value = getattr(holder, name, None)
            if isinstance(value, int):
                return value
    raise ConfigError(f"{site.name} does not tell its number of heads; its heads cannot be named.")
