"""How far layers select the same keys: ``|A ∩ B| / k`` of their top-``k`` sets at the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .stats import Estimate, stratified_mean

if TYPE_CHECKING:
    from .profile import LayerProfile


def comparable(a: LayerProfile, b: LayerProfile) -> bool:
    """Whether two layers were measured at the same rows, against as many keys, with as many key heads and top keys."""
    return (
        (a.role, a.kv_len, a.selected.shape) == (b.role, b.kv_len, b.selected.shape)
        and torch.equal(a.rows.index, b.rows.index)
        and torch.equal(a.rows.weight, b.rows.weight)
    )


def overlap(layers: Sequence[LayerProfile]) -> Estimate:
    """Overlap of the selected keys between all pairs of layers.

    Only rows that may see more than ``k`` keys in both layers count, since any two sets agree on the others. Sets drawn
    at random would overlap by ``k / allowed`` keys; see :func:`chance_overlap`.

    Returns:
        An :class:`Estimate` of shape ``(L, L, 1 + Hkv)``: in ``[..., 0]`` the sets come from the weights averaged over all
        heads, in ``[..., 1 + h]`` from the query heads of key head ``h`` in both layers. NaN between layers that cannot be
        compared (self- and cross-attention, other numbers of key heads) and where no row counts.
    """
    count = len(layers)
    sets = max((layer.selected.shape[1] for layer in layers), default=1)
    mean = torch.full((count, count, sets), torch.nan, dtype=torch.float64)
    low, high = mean.clone(), mean.clone()
    for i, first in enumerate(layers):
        batch, width, drawn, top = first.selected.shape
        member = torch.zeros(batch, width, drawn, first.kv_len + 1, dtype=torch.bool, device=first.selected.device)
        index = first.selected.long()
        member.scatter_(
            -1, torch.where(index >= 0, index, first.kv_len), True
        )  # −1 stands only in rows that do not count
        for j in range(i, count):
            second = layers[j]
            if not comparable(first, second):
                continue
            other = second.selected.long()
            shared = member.gather(-1, torch.where(other >= 0, other, first.kv_len)).sum(-1) / top  # (B, sets, R)
            keep = (first.allowed > top) & (second.allowed > top)
            found = stratified_mean(shared.transpose(0, 1), first.rows, keep)
            for into, value in ((mean, found.mean), (low, found.low), (high, found.high)):
                into[i, j, :width] = into[j, i, :width] = value.cpu()
    return Estimate(mean, low, high)


def chance_overlap(layer: LayerProfile) -> float:
    """Mean overlap of two random top-``k`` sets at the rows that :func:`overlap` counts: the mean of ``k / allowed``."""
    top = layer.selected.shape[-1]
    keep = layer.allowed > top
    return float(stratified_mean(top / layer.allowed.clamp(min=1), layer.rows, keep).mean)
