"""A ULSD-style head on the fusion backbone: segments from their centres, snapped to junctions.

Proposals are scored by their centre; the verification network of the published detector (line-of-interest pooling) is left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import FusionBackbone
from .targets import LineMaps

HEADS = {"line": 1, "junction": 2, "junction_offset": 2, "centre": 2, "centre_offset": 2, "ends": 4}
STRIDE = 4
JUNCTIONS, LEAST_JUNCTION, CENTRES = 300, 0.008, 5000


class Lines(NamedTuple):
    """Of one image, best first: ``segments (k, 2, 2)``, ends ``(x, y)`` in pixels, and ``scores (k,)``."""

    segments: Tensor
    scores: Tensor


class LineDetector(nn.Module):
    """Line segments from a frame and its events.

    Args:
        channels, options: of :class:`~foveal.models.line_segments.backbone.FusionBackbone`.
    """

    def __init__(self, channels: tuple[int, int] = (3, 10), **options: Any) -> None:
        super().__init__()
        self.backbone = FusionBackbone(channels, **options)
        width = self.backbone.features
        self.heads = nn.ModuleDict({
            name: nn.Sequential(nn.Conv2d(width, width // 4, 3, padding=1), nn.ReLU(), nn.Conv2d(width // 4, count, 1))
            for name, count in HEADS.items()
        })  # fmt: skip

    def forward(self, frame: Tensor, events: Tensor) -> LineMaps:
        """Maps on a quarter of the sides of ``frame (B, C, H, W)`` and ``events (B, E, H, W)``."""
        y = self.backbone(frame, events)[-1]
        found = {name: head(y) for name, head in self.heads.items()}
        return LineMaps(
            found["line"][:, 0], found["junction"], found["junction_offset"].sigmoid() - 0.5,
            found["centre"], found["centre_offset"].sigmoid() - 0.5, found["ends"].tanh() * max(y.shape[-2:]),
        )  # fmt: skip

    @torch.no_grad()
    def detect(self, frame: Tensor, events: Tensor) -> list[Lines]:
        """Segments of every image, in pixels."""
        return [Lines(STRIDE * s, p) for s, p in decode(self(frame, events))]


def decode(maps: LineMaps) -> list[Lines]:
    """Segments in cells: those of the best centres, each end moved to the nearest junction; of equal ones the best is kept, and one
    whose ends fall together is dropped. Without junctions there is nothing."""
    junction = peaks(maps.junction.softmax(1)[:, 1])
    centre = maps.centre.softmax(1)[:, 1]
    height, width = centre.shape[1:]
    grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")).to(centre) + 0.5
    found = []
    for i in range(len(centre)):
        value, at = junction[i].flatten().topk(min(JUNCTIONS, height * width))
        corners = (grid + maps.junction_offset[i]).flatten(1)[:, at[value > LEAST_JUNCTION]].mT
        score, at = centre[i].flatten().topk(min(CENTRES, height * width))
        if not len(corners):
            found.append(Lines(centre.new_zeros(0, 2, 2), centre.new_zeros(0)))
            continue
        middle = (grid + maps.centre_offset[i]).flatten(1)[:, at].mT
        ends = middle[:, None] + maps.ends[i].flatten(1)[:, at].mT.unflatten(1, (2, 2))
        pair = torch.cdist(ends.flatten(0, 1), corners).argmin(1).view(-1, 2).sort(1).values
        key = pair[:, 0] * len(corners) + pair[:, 1]
        first = torch.full((len(corners) ** 2,), len(key)).scatter_reduce(0, key, torch.arange(len(key)), "amin")
        keep = (first[key] == torch.arange(len(key))) & (pair[:, 0] != pair[:, 1])
        found.append(Lines(corners[pair[keep]], score[keep]))
    return found


def peaks(score: Tensor) -> Tensor:
    """``(B, h, w)`` with everything that is not the largest of its 3 × 3 cells set to 0."""
    return score * (score == F.max_pool2d(score[:, None], 3, 1, 1)[:, 0])
