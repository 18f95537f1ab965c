"""Layouts of tokens that belong to clusters: flat groups, a band in an order sorted by cluster, and lists of last members."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import EMPTY, PARTIAL
from ..core.layouts import BlockMask, KeySelection, block_mask

TILE = 128


def flat_members(index: Tensor, real: Tensor, length: int, row: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Members ``(B, H, C, w)`` as flat per-head indices and boundaries of the groups (see :class:`Groups`).

    Args:
        row: ``(G,)`` flat (batch, head) of each group, when ``index`` is ``(G, 1, w)``.
    """
    if row is None:
        row = torch.arange(index.shape[0] * index.shape[1], device=index.device).repeat_interleave(index.shape[2])
    flat, kept = index.reshape(-1, index.shape[-1]), real.reshape(-1, index.shape[-1])
    cu = pad(kept.sum(-1).cumsum(0), (1, 0))
    return (row[:, None] * length + flat)[kept], cu


def cluster_band(cluster: Tensor, window: int, mask_self: bool = False) -> BlockMask:
    """``BlockMask`` of the rows that see the last ``window`` entries of their own cluster, in an order sorted by cluster.

    Args:
        cluster: ``(B, H, N)`` ascending cluster of every place.
    """
    n, device = cluster.shape[-1], cluster.device
    blocks = math.ceil(n / TILE)
    last = torch.arange(blocks, device=device).mul(TILE).add(TILE - 1).clamp(max=n - 1)
    first = torch.arange(blocks, device=device) * TILE
    u, t = torch.arange(blocks, device=device)[:, None], torch.arange(blocks, device=device)
    near = (t <= u) & (first[:, None] - last[None, :] < window)
    # the first row of a tile has the smallest cluster of the tile, its last row the largest
    meets = cluster[..., last][..., None, :] >= cluster[..., first][..., :, None]
    kinds = torch.where(near & meets, PARTIAL, EMPTY).to(torch.int8)

    def inside(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = (cluster[b, h, q] == cluster[b, h, k]) & (q - k < window) & (k <= q)
        return same & (q != k) if mask_self else same

    return block_mask(kinds, (TILE, TILE), (n, n), inside)


def last_members(cluster: Tensor, rows: int, window: int) -> KeySelection:
    """For each of the last ``rows`` tokens, itself and the ``window − 1`` earlier members of its cluster nearest in time.

    Args:
        cluster: ``(B, H, n)`` cluster of every token so far.
    """
    n, device = cluster.shape[-1], cluster.device
    own = torch.arange(n - rows, n, device=device)
    place = torch.arange(n, device=device)
    same = (cluster[..., n - rows :, None] == cluster[..., None, :]) & (place <= own[:, None])  # (B, H, rows, n)
    newest = torch.where(same, place, -1).topk(min(window, n), -1).values
    return KeySelection(newest, 1)
