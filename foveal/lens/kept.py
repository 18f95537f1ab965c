"""The pairs that a policy kept in one layer, as a mask of a few rows: what a probe asks beside the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import FULL, PARTIAL, BaseMask
from ..core.layouts import BlockMask, Groups, KeySelection, Layout, block_mask_kinds


@dataclass(frozen=True, eq=False)
class Kept:
    """What was kept.

    Attributes:
        parts: query heads that share a layout, and the layout (None: everything); its heads are numbered inside the part.
        base: the mask that the model demands.
    """

    parts: Sequence[tuple[Sequence[int], Layout | None]]
    base: BaseMask

    @property
    def everything(self) -> bool:
        """Whether no layout drops anything."""
        return all(layout is None for _, layout in self.parts)

    def block(self, b: int, heads: slice, rows: slice, keys: slice) -> Tensor:
        """``(G, R, K)`` bool: layout and base mask both keep the pair."""
        device = self.base.device
        q = torch.arange(rows.start, rows.stop, device=device)[:, None]
        k = torch.arange(keys.start, keys.stop, device=device)[None]
        at = torch.full_like(k[:1, :1], b)
        seen = self.base.allowed(at, torch.zeros_like(at), q, k)
        out = seen.expand(heads.stop - heads.start, *seen.shape).clone()
        for members, layout in self.parts:
            inside = [h for h in range(heads.start, heads.stop) if h in members]
            if layout is None or not inside:
                continue
            slots = [members.index(h) for h in inside]
            chosen = torch.tensor([h - heads.start for h in inside], device=device)
            out[chosen] &= _kept(layout, self.base, len(members), b, slots, q[:, 0], k[0])
        return out


def _kept(layout: Layout, base: BaseMask, part: int, b: int, heads: Sequence[int], q: Tensor, k: Tensor) -> Tensor:
    """``(len(heads), R, K)`` bool for heads numbered inside a part of ``part`` query heads."""
    if isinstance(layout, BlockMask):
        return _of_block_mask(layout, b, heads, q, k)
    if isinstance(layout, KeySelection):
        return _of_lists(layout, part, b, heads, q, k)
    assert isinstance(layout, Groups)
    return _of_groups(layout, base, part, b, heads, q, k)


def _of_block_mask(mask: BlockMask, b: int, heads: Sequence[int], q: Tensor, k: Tensor) -> Tensor:
    kinds = _kinds(mask)
    kinds = kinds[b % kinds.shape[0]]
    h = torch.tensor(heads, device=q.device)[:, None, None]
    tile = kinds[h % kinds.shape[0], (q // mask.BLOCK_SIZE[0])[:, None], k // mask.BLOCK_SIZE[1]]
    partial = tile == PARTIAL
    if not bool(partial.any()):
        return tile == FULL
    inside = mask.mask_mod(torch.full_like(h, b), h, q[:, None], k)
    return (tile == FULL) | (partial & inside)


def _kinds(mask: BlockMask) -> Tensor:
    """Tile kinds, remembered with the mask: every block of rows asks for them."""
    found: Tensor | None = getattr(mask, "_foveal_kinds", None)
    if found is None:
        found = block_mask_kinds(mask)
        mask._foveal_kinds = found  # type: ignore[attr-defined]
    return found


def _of_lists(layout: KeySelection, part: int, b: int, heads: Sequence[int], q: Tensor, k: Tensor) -> Tensor:
    index = layout.index[b % layout.index.shape[0]]  # (heads of the lists, blocks, K)
    of = torch.tensor(heads, device=q.device) * index.shape[0] // part
    first, size = int(k[0]), k.numel()
    listed = index[of][:, q // layout.block_size].long() - first  # (heads, R, listed)
    ok = (listed >= 0) & (listed < size)
    if layout.limit is not None:
        ok &= listed + first < layout.limit[b % layout.limit.shape[0], q][None, :, None]
    out = torch.zeros(len(heads), q.numel(), size + 1, dtype=torch.bool, device=q.device)
    return out.scatter_(-1, torch.where(ok, listed, size), True)[..., :size]


def _of_groups(layout: Groups, base: BaseMask, part: int, b: int, heads: Sequence[int], q: Tensor, k: Tensor) -> Tensor:
    first, size, low = int(q[0]), q.numel(), int(k[0])
    of = torch.repeat_interleave(torch.arange(layout.cu_q.numel() - 1, device=q.device), layout.cu_q.diff())
    out = torch.zeros(len(heads), size, k.numel(), dtype=torch.bool, device=q.device)
    for slot, h in enumerate(heads):
        line = (b * part + h if layout.per_head else b) * base.q_len
        row = layout.q_index - line - first
        here = (row >= 0) & (row < size)
        for g in of[here].unique().tolist():
            members = row[here & (of == g)]
            key = layout.k_index[layout.cu_k[g] : layout.cu_k[g + 1]] % base.kv_len - low
            key = key[(key >= 0) & (key < k.numel())]
            out[slot, members[:, None], key] = True
    return out
