"""What a selection really keeps: ``density`` over pairs, ``tile_density`` over tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base_mask import EMPTY, FULL, PARTIAL, BaseMask
from .layouts import BlockMask, Groups, KeySelection, Layout, block_mask_kinds, narrow


@dataclass(frozen=True)
class Density:
    """Counts over all batch rows and heads.

    Attributes:
        pairs: visible pairs.
        allowed: pairs that the base mask allows; ``density = pairs / allowed`` (dense causal is 1).
        tiles: tiles (or gathered keys) computed.
        allowed_tiles: tiles that the base mask touches.
    """

    pairs: int
    allowed: int
    tiles: float
    allowed_tiles: float

    @property
    def density(self) -> float:
        return self.pairs / self.allowed if self.allowed else 0.0

    @property
    def tile_density(self) -> float:
        return self.tiles / self.allowed_tiles if self.allowed_tiles else 0.0

    def __add__(self, other: Density) -> Density:
        return Density(
            self.pairs + other.pairs,
            self.allowed + other.allowed,
            self.tiles + other.tiles,
            self.allowed_tiles + other.allowed_tiles,
        )


def measure(
    layout: Layout | None, base: BaseMask, batch: int, num_heads: int, num_kv_heads: int | None = None
) -> Density:
    """Count exactly what ``layout`` keeps of ``base``, tile row by tile row; memory stays O(N).

    Args:
        layout: what a pattern selected; None is dense.
        base: the model's own mask for these lengths.
        batch, num_heads, num_kv_heads: sizes of q and k.
    """
    area = base.area()
    allowed = int(area.sum()) * (batch // area.shape[0]) * num_heads
    if layout is None:
        tiles = (
            float((base.block_map(128, 128) > EMPTY).sum()) * (batch // base.block_map(128, 128).shape[0]) * num_heads
        )
        return Density(allowed, allowed, tiles, tiles)
    if isinstance(layout, BlockMask):
        return _blocks(layout, base, batch, num_heads, allowed)
    if isinstance(layout, KeySelection):
        return _lists(layout, base, batch, num_heads, allowed)
    return _groups(layout, base, batch, num_heads, num_kv_heads or num_heads, allowed)


def _blocks(mask: BlockMask, base: BaseMask, batch: int, num_heads: int, allowed: int) -> Density:
    joint = narrow(mask, base, transpose=False)
    kinds = block_mask_kinds(joint)
    q_block, kv_block = joint.BLOCK_SIZE
    repeat = (batch // kinds.shape[0]) * (num_heads // kinds.shape[1])
    device = kinds.device
    rows = (base.q_len - torch.arange(kinds.shape[2], device=device) * q_block).clamp(max=q_block)
    cols = (base.kv_len - torch.arange(kinds.shape[3], device=device) * kv_block).clamp(max=kv_block)
    pairs = int(((kinds == FULL) * rows[:, None] * cols[None, :]).sum())
    b, h, u, c = (kinds == PARTIAL).nonzero(as_tuple=True)
    q_in, k_in = torch.arange(q_block, device=device), torch.arange(kv_block, device=device)
    for part in torch.arange(b.numel(), device=device).split(max(1, (1 << 22) // (q_block * kv_block))):
        q = u[part, None, None] * q_block + q_in[None, :, None]
        k = c[part, None, None] * kv_block + k_in[None, None, :]
        inside = (q < base.q_len) & (k < base.kv_len)
        q, k = q.clamp(max=base.q_len - 1), k.clamp(max=base.kv_len - 1)
        pairs += int((joint.mask_mod(b[part, None, None], h[part, None, None], q, k) & inside).sum())
    reach = base.block_map(q_block, kv_block) > EMPTY
    return Density(
        pairs * repeat,
        allowed,
        float((kinds > EMPTY).sum()) * repeat,
        float(reach.sum()) * (batch // reach.shape[0]) * num_heads,
    )


def visible(layout: KeySelection, base: BaseMask, block: int, batch: int) -> Tensor:
    """``(batch, heads, rows, K)`` bool: which listed keys each row of one block sees (base mask, padding and limit applied)."""
    index = layout.index[:, :, block].expand(batch, -1, -1)
    first = block * layout.block_size
    q = torch.arange(first, min(first + layout.block_size, base.q_len), device=index.device)
    b = torch.arange(batch, device=index.device)[:, None, None, None]
    h = torch.arange(index.shape[1], device=index.device)[None, :, None, None]
    keys = index[:, :, None, :]
    ok = (keys >= 0) & base.allowed(b, h, q[None, None, :, None], keys)
    if layout.limit is not None:
        ok = ok & (keys < layout.limit[:, None, q, None])
    return ok


def _lists(layout: KeySelection, base: BaseMask, batch: int, num_heads: int, allowed: int) -> Density:
    pairs, listed = 0, 0
    for block in range(layout.index.shape[2]):
        ok = visible(layout, base, block, batch)
        pairs += int(ok.sum()) * (num_heads // ok.shape[1])
        listed += int(ok.any(2).sum()) * ok.shape[2] * (num_heads // ok.shape[1])
    return Density(pairs, allowed, float(listed), float(_dense_listed(base, batch, layout.block_size)) * num_heads)


def _dense_listed(base: BaseMask, batch: int, block_size: int) -> int:
    spread = base.block_map(block_size, 1) > EMPTY
    rows = (base.q_len - torch.arange(spread.shape[1], device=spread.device) * block_size).clamp(max=block_size)
    return int((spread * rows[:, None]).sum()) * (batch // spread.shape[0])


def _groups(layout: Groups, base: BaseMask, batch: int, num_heads: int, num_kv_heads: int, allowed: int) -> Density:
    n_q, n_k = layout.cu_q.diff(), layout.cu_k.diff()
    pairs = (
        _group_pairs(layout, base, num_heads) if base.predicate is None else _predicate_pairs(layout, base, num_heads)
    )
    repeat = 1 if layout.per_head else num_heads
    return Density(pairs * repeat, allowed, float((n_q * n_k).sum() * repeat), _dense_tiles(base, batch) * num_heads)


def _dense_tiles(base: BaseMask, batch: int, size: int = 128) -> float:
    """Pairs in the tiles that a dense kernel with tiles of ``size`` computes, over all batch rows."""
    reach = base.block_map(size, size) > EMPTY
    rows, keys = (
        (n - torch.arange(count, device=base.device) * size).clamp(max=size)
        for n, count in zip((base.q_len, base.kv_len), reach.shape[1:], strict=True)
    )
    return float((reach * rows[:, None] * keys).sum()) * (batch // reach.shape[0])


def _group_pairs(layout: Groups, base: BaseMask, num_heads: int) -> int:
    """Visible pairs: for every query, the keys of its group that lie in its interval and are no padding."""
    groups = torch.arange(layout.cu_q.numel() - 1, device=base.device)
    q_group, k_group = (torch.repeat_interleave(groups, cu.diff()) for cu in (layout.cu_q, layout.cu_k))
    row = layout.q_index % base.q_len
    b = layout.q_index // (base.q_len * (num_heads if layout.per_head else 1))
    of_group = torch.zeros_like(groups).scatter(0, q_group, b)
    key = layout.k_index % max(base.kv_len, 1)
    if base.valid is not None:
        real = base.valid[of_group[k_group] if base.valid.shape[0] > 1 else 0, key]
        key, k_group = key[real], k_group[real]
    ranked = (k_group * (base.kv_len + 1) + key).sort().values
    line = b if base.lo.shape[0] > 1 else 0
    lo, hi = (torch.searchsorted(ranked, q_group * (base.kv_len + 1) + x[line, row]) for x in (base.lo, base.hi))
    return int((hi - lo).sum())


def _predicate_pairs(layout: Groups, base: BaseMask, num_heads: int) -> int:
    pairs = 0
    for g in range(layout.cu_q.numel() - 1):
        k = layout.k_index[layout.cu_k[g] : layout.cu_k[g + 1]]
        for rows in layout.q_index[layout.cu_q[g] : layout.cu_q[g + 1]].split(1024):
            b = rows // (base.q_len * (num_heads if layout.per_head else 1))
            seen = base.allowed(
                b[:, None], torch.zeros_like(b)[:, None], (rows % base.q_len)[:, None], (k % base.kv_len)[None]
            )
            pairs += int(seen.sum())
    return pairs
