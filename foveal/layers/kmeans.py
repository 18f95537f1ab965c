"""Online k-means over the tokens of attention heads: assignment, nearest tokens, moving averages, the clustering loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Centroids:
    """State of the clustering; never changed in place.

    Attributes:
        centres: ``(H, C, D)`` centroids. sums: ``(H, C, D)`` and counts: ``(H, C)`` moving averages.
    """

    centres: Tensor
    sums: Tensor
    counts: Tensor


def normalise(x: Tensor) -> Tensor:
    """Mean 0 and norm √D over the last axis."""
    return nn.functional.layer_norm(x, (x.shape[-1],))


def assign(x: Tensor, centres: Tensor) -> Tensor:
    """``(B, H, N)`` cluster of the largest product; x ``(B, H, N, D)``, centres ``(H, C, D)``."""
    return (x @ centres.transpose(-1, -2).to(x.dtype)).argmax(-1)


def nearest_tokens(x: Tensor, centres: Tensor, window: int, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The ``window`` tokens nearest to each centroid, in the order of time.

    Args:
        x: ``(B, H, N, D)``. centres: ``(H, C, D)``. window: clamped to N.
        valid: ``(B, N)`` bool, False on padding, which is never a member.

    Returns:
        ``(B, H, C, w)`` ascending indices, and which of them are real members.
    """
    score = centres.to(x.dtype) @ x.transpose(-1, -2)
    if valid is not None:
        score = score.masked_fill(~valid[:, None, None], -torch.inf)
    top = score.topk(min(window, x.shape[2]), -1)
    index, order = top.indices.sort(-1)
    return index, torch.isfinite(top.values.gather(-1, order))


def update(state: Centroids, x: Tensor, decay: float, epsilon: float = 1e-5, valid: Tensor | None = None) -> Centroids:
    """One step of online k-means; ``decay`` 0 gives the mean of each cluster in this batch. Clusters without a token stay.

    Args:
        x: ``(B, H, N, D)`` normalised tokens; no gradient is taken.
        epsilon: smooths counts: ``(count + ε) / (total + C·ε) · total``.
        valid: ``(B, N)`` bool, False on padding.
    """
    with torch.no_grad():
        x = x.detach()
        one = nn.functional.one_hot(assign(x, state.centres), state.centres.shape[1]).to(x.dtype)  # (B, H, N, C)
        if valid is not None:
            one = one * valid[:, None, :, None].to(x.dtype)
        counts = decay * state.counts + (1 - decay) * one.sum((0, 2))
        sums = decay * state.sums + (1 - decay) * torch.einsum("bhnc,bhnd->hcd", one, x)
        total = counts.sum(-1, keepdim=True)
        smooth = (counts + epsilon) / (total + counts.shape[-1] * epsilon) * total
        alive = counts > 0
        centres = torch.where(
            alive[..., None], sums / smooth.clamp(min=torch.finfo(x.dtype).tiny)[..., None], state.centres
        )
    return Centroids(centres, sums, counts)


def clustering_loss(x: Tensor, centres: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean ‖x − μ‖² over tokens and channels, with μ the token's own centroid, which gets no gradient."""
    own = assign(x.detach(), centres)
    head = torch.arange(x.shape[1], device=x.device)[None, :, None]
    distance = (x - centres.detach().to(x.dtype)[head, own]).square().mean(-1)
    if valid is None:
        return distance.mean()
    weight = valid[:, None].to(x.dtype).expand_as(distance)
    return (distance * weight).sum() / weight.sum().clamp(min=1)
