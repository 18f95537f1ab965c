"""What the ULSD-style head learns: maps of lines, junctions and segment centres on the grid, and the losses.

Positions are in cells, ``(x, y)``; the middle of a cell is at ½.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import ShapeError

WEIGHTS = {"line": 0.5, "junction": 8.0, "junction_offset": 0.25, "centre": 8.0, "centre_offset": 0.25, "ends": 1.0}


class LineMaps(NamedTuple):
    """What the head says, on the grid.

    Attributes:
        line: ``(B, h, w)`` logits of a segment crossing the cell. junction, centre: ``(B, 2, h, w)`` logits of no and yes.
        junction_offset, centre_offset: ``(B, 2, h, w)`` from the middle of the cell, −½ to ½.
        ends: ``(B, 4, h, w)``, both ends from the centre, in cells.
    """

    line: Tensor
    junction: Tensor
    junction_offset: Tensor
    centre: Tensor
    centre_offset: Tensor
    ends: Tensor


def line_targets(segments: Sequence[Tensor], size: tuple[int, int]) -> LineMaps:
    """The truth in the same places; ``junction`` and ``centre`` are ``(B, h, w)`` of 0 and 1.

    Args:
        segments: per image ``(k, 2, 2)``, ends in cells. size: height and width of the grid.

    Raises:
        ShapeError: segments of another shape, or ends outside the grid.
    """
    height, width = size
    n = len(segments)
    line, junction, centre = (torch.zeros(n, height, width) for _ in range(3))
    junction_offset, centre_offset, ends = (torch.zeros(n, c, height, width) for c in (2, 2, 4))
    side = torch.tensor([width, height])
    for i, one in enumerate(segments):
        if one.dim() != 3 or one.shape[1:] != (2, 2) or bool(((one < 0) | (one > side)).any()):
            raise ShapeError(
                f"segments have shape {tuple(one.shape)}; expected (k, 2, 2) inside {height} × {width} cells."
            )
        share = torch.linspace(0, 1, 4 * max(size))[:, None, None]
        x, y = cell(one[:, 0] + share * (one[:, 1] - one[:, 0]), side).unbind(-1)
        line[i, y, x] = 1
        points = one.flatten(0, 1)
        x, y = cell(points, side).unbind(-1)
        junction[i, y, x] = 1
        junction_offset[i, :, y, x] = (points - cell(points, side) - 0.5).mT
        middle = one.mean(1)
        x, y = cell(middle, side).unbind(-1)
        centre[i, y, x] = 1
        centre_offset[i, :, y, x] = (middle - cell(middle, side) - 0.5).mT
        ends[i, :, y, x] = (one - middle[:, None]).flatten(1).mT
    return LineMaps(line, junction, junction_offset, centre, centre_offset, ends)


def cell(points: Tensor, side: Tensor) -> Tensor:
    """``(…, 2)`` whole numbers of the cell of each point; the far edge belongs to the last one."""
    return points.floor().long().clamp(min=torch.zeros_like(side), max=side - 1)


def line_losses(maps: LineMaps, truth: LineMaps, weights: Mapping[str, float] = WEIGHTS) -> dict[str, Tensor]:
    """Losses by name, and their weighted sum ``total``; the weights are ULSD's unless others are given.

    Offsets count where there is a junction or centre, and are 0 where there is none. Ends may be told in either order (ours: the
    smaller of both losses).
    """
    ends = torch.minimum(
        *(F.smooth_l1_loss(maps.ends, t, reduction="none").mean(1) for t in (truth.ends, truth.ends.roll(2, 1)))
    )
    found = {
        "line": F.binary_cross_entropy_with_logits(maps.line, truth.line),
        "junction": F.cross_entropy(maps.junction, truth.junction.long()),
        "junction_offset": _where(truth.junction, (maps.junction_offset - truth.junction_offset).abs().sum(1)),
        "centre": F.cross_entropy(maps.centre, truth.centre.long()),
        "centre_offset": _where(truth.centre, (maps.centre_offset - truth.centre_offset).abs().sum(1)),
        "ends": _where(truth.centre, ends),
    }
    return found | {"total": torch.stack([weights[name] * value for name, value in found.items()]).sum()}


def _where(mask: Tensor, loss: Tensor) -> Tensor:
    return (mask * loss).sum() / mask.sum().clamp(min=1)
