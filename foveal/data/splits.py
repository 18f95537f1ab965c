"""Splits that keep what belongs together on one side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError


def folds(groups: Tensor, count: int, *, grouped: bool = True, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Cross-validation: ``count`` pairs of training and test indices.

    Args:
        groups: ``(n,)`` int, such as the trial or the subject of every window.
        count: folds.
        grouped: whole groups go to one side. False shuffles single examples, which leaks whatever a group has in common.
        seed: of the shuffling.

    Raises:
        ConfigError: fewer than two folds, or more than there are groups (or examples).
    """
    units = groups.unique() if grouped else torch.arange(len(groups))
    if not 2 <= count <= len(units):
        raise ConfigError(
            f"folds has count={count} for {len(units)} {'groups' if grouped else 'examples'}; expected 2 to {len(units)}."
        )
    order = units[torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))]
    result = []
    for part in order.tensor_split(count):
        held = torch.isin(groups, part) if grouped else torch.isin(torch.arange(len(groups)), part)
        result.append(((~held).nonzero()[:, 0], held.nonzero()[:, 0]))
    return result
