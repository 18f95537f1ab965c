"""A planted effect: image sinks that are made, so that an instrument can be shown to see what is known to be there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..hf.interventions import Act, Moment, Reweigh
from ..hf.vision import ImageTokens, forward_inputs, image_tokens, visual_mask
from .keys import over_keys, over_rows

if TYPE_CHECKING:
    from ..hf import Handle


@dataclass(frozen=True, eq=False)
class PlantedSinks:
    """Move a share of every text row's attention to the image onto chosen image tokens, in proportion to what these receive.

    Serves prompts that run in one forward, as scored answers do.

    Attributes:
        keys: ``(N,)`` or ``(B, N)`` bool, the image tokens that become sinks. share: of the weight on the other image tokens.
        min_mass: rows with less weight on the image are left alone.
    """

    keys: Tensor
    share: float
    min_mass: float = 0.2

    names_positions = True

    def on(self, handle: Handle) -> Act:
        """Find the image tokens, and start."""
        if not 0 <= self.share <= 1:
            raise ConfigError(f"share is {self.share}; expected 0 to 1.")
        return _Planting(self, image_tokens(handle.model))


class _Planting(Act):
    def __init__(self, what: PlantedSinks, tokens: ImageTokens) -> None:
        self.what, self.tokens, self.image = what, tokens, torch.zeros(0, dtype=torch.bool)

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.image = visual_mask(self.tokens, forward_inputs(module, args, kwargs), module)

    def reweigh(self, moment: Moment) -> Reweigh | None:
        image = over_keys(self.image, moment)
        sink = over_keys(self.what.keys, moment) & image
        share, least = self.what.share, self.what.min_mass

        def factors(mass: Tensor) -> Tensor:
            content, sinks = mass[1], mass[2]
            moved = (content + sinks >= least) & (sinks > 0)
            up = 1 + share * content / torch.where(sinks > 0, sinks, 1.0)
            one = torch.ones_like(content)
            return torch.where(moved, torch.stack([one, one * (1 - share), up]), 1.0)

        return Reweigh(torch.where(sink, 2, image.long()), 3, ~over_rows(image, moment), factors)
