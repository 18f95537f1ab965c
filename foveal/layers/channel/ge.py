"""Gather-excite (arXiv 1810.12348) over the whole extent: θ− pools, θ gathers by a learned filter, θ+ adds a bottleneck."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ...core.errors import UnsupportedError
from ...core.registry import register
from .base import ChannelAttention, Gate, apply_gate, bottleneck, check_places, gate_name, mean, places


@register("channel", "ge")
class GatherExcite(ChannelAttention):
    """σ of the gathered vector; no parameters unless ``learned`` or ``mlp``.

    Args:
        channels: C.
        learned: gather by one filter per channel over all places and a batch normalisation (θ): C·N + 2C parameters.
        mlp: a bottleneck after it (with ``learned``: θ+): 2C²/r more.
        seq_len: places, needed with ``learned``. reduction: r. gate: last function.
    """

    def __init__(
        self,
        channels: int,
        *,
        learned: bool = False,
        mlp: bool = False,
        seq_len: int | tuple[int, ...] | None = None,
        reduction: int = 4,
        gate: Gate = "sigmoid",
    ) -> None:
        super().__init__(channels)
        self.gather: nn.Sequential | None = None
        if learned:
            self.sizes = places(seq_len, self)
            over_all = nn.Conv1d(channels, channels, math.prod(self.sizes), groups=channels, bias=False)
            self.gather = nn.Sequential(over_all, nn.BatchNorm1d(channels))
        self.mlp = bottleneck(channels, reduction, False, self) if mlp else nn.Identity()
        self.gate_function = gate_name(gate, self)

    def weights(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.gather is None:
            y = mean(x, valid)
        else:
            if valid is not None:
                raise UnsupportedError(
                    "GatherExcite with learned=True has one weight per place and cannot leave padding out; use learned=False."
                )
            check_places(x, self.sizes, self)
            y = self.gather(x.flatten(2))[..., 0]
        return apply_gate(self.mlp(y), self.gate_function)
