"""Real handwritten digits that scikit-learn's package carries: 1,797 pictures of 8 × 8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import DataError

COUNT = 1797


def digits(*, held_out: int = 297, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Digits split into training and held-out ones.

    Args:
        held_out: pictures kept apart.
        seed: deals them.

    Returns:
        ``images (n, 1, 8, 8)`` from −1 to 1 and ``labels (n,)`` for training, then the same for the held-out ones.

    Raises:
        DataError: scikit-learn is missing, or ``held_out`` leaves nothing.
    """
    if not 0 < held_out < COUNT:
        raise DataError(f"digits has held_out={held_out}; expected 1 to {COUNT - 1}.")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'foveal[data]'."
        ) from None
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, rest = order[held_out:], order[:held_out]
    return images[train], labels[train], images[rest], labels[rest]
