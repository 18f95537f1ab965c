"""What a layout asks of the kernels: pieces of rows and keys, and the tiles into which they are cut."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.layouts import Groups, KeySelection
from ..call import AttentionCall
from ..list_plan import sharing


class Sizes(NamedTuple):
    """Numbers that all kernels take, in this order.

    Attributes:
        members: entries of ``q_index`` in all groups.
        row_heads, per_row: heads that have lists of their own, and query heads that share one. size: query rows per list.
        width: keys per list. index_batch, index_head: strides of lists, 0 where sequences or heads share them.
    """

    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    members: int = 0
    row_heads: int = 1
    per_row: int = 1
    size: int = 1
    width: int = 1
    index_batch: int = 0
    index_head: int = 0


@dataclass(frozen=True, eq=False)
class Work:
    """What the kernels work on.

    Attributes:
        lists: pieces are the lists of a ``KeySelection``; else the groups of ``Groups``.
        q_index, cu_q, k_index, cu_k: those of the groups; of lists only ``k_index``, ``(B or 1, heads, blocks, width)``.
        pieces: how many. layers: of these, on the second axis of the grid: heads, or sequences times heads.
        per_head: the groups count rows over the heads. of_members: a row is a membership of its own, in their order.
        order, begins: where queries are in several groups: their entries one query after the other, and where each begins.
    """

    lists: bool
    q_index: Tensor
    cu_q: Tensor
    k_index: Tensor
    cu_k: Tensor
    sizes: Sizes
    pieces: int
    layers: int
    per_head: bool = False
    of_members: bool = False
    order: Tensor | None = None
    begins: Tensor | None = None
    _tiles: dict[tuple[str, int], tuple[Tensor, Tensor, int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Query rows of a list, over the heads that share it; of a group there may be any number."""
        return self.sizes.per_row * self.sizes.size

    def tiles(self, side: str, size: int) -> tuple[Tensor, Tensor, int]:
        """Per tile of ``size`` rows (``side`` "q") or keys ("k"): its piece and its first entry, and how many tiles there are."""
        if self.lists:  # the kernels work it out
            return (
                self.k_index,
                self.k_index,
                self.pieces * -(-(self.rows if side == "q" else self.sizes.width) // size),
            )
        if (side, size) not in self._tiles:
            cu = self.cu_q if side == "q" else self.cu_k
            count = -(-cu.diff() // size)
            piece = torch.repeat_interleave(torch.arange(self.pieces, device=cu.device), count)
            nth = torch.arange(piece.numel(), device=cu.device) - (count.cumsum(0) - count)[piece]
            self._tiles[side, size] = piece, nth * size, piece.numel()
        return self._tiles[side, size]


def work_of(call: AttentionCall) -> Work:
    """The work of a call; that of groups is kept as long as their layout lives."""
    layout = call.layout
    if isinstance(layout, KeySelection):
        return _of_lists(call, layout)
    assert isinstance(layout, Groups)
    batch, *sizes = call.q.shape[0], call.q.shape[1], call.k.shape[1], call.base.q_len, call.base.kv_len
    known = _known.setdefault(layout, {})
    if (batch, *sizes) not in known:
        known[batch, *sizes] = _of_groups(layout, batch, *sizes)
    return known[batch, *sizes]


_known: weakref.WeakKeyDictionary[Groups, dict[tuple[int, ...], Work]] = weakref.WeakKeyDictionary()


def _of_lists(call: AttentionCall, layout: KeySelection) -> Work:
    batch, heads = call.q.shape[:2]
    listed, per_row = sharing(call, layout)
    index = layout.index.contiguous()
    of_batch, of_heads, blocks, width = index.shape
    sizes = Sizes(
        heads, call.k.shape[1], call.base.q_len, call.base.kv_len, 0, listed, per_row, layout.block_size, width,
        0 if of_batch == 1 else of_heads * blocks * width, 0 if of_heads == 1 else blocks * width,
    )  # fmt: skip
    return Work(True, index, index, index, index, sizes, blocks, batch * listed)


def _of_groups(layout: Groups, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int) -> Work:
    members, average = layout.q_index.numel(), layout.combine == "mean"
    order = begins = None
    if not average:
        count = torch.bincount(layout.q_index, minlength=batch * q_len * (heads if layout.per_head else 1))
        if members and int(count.max()) > 1:
            order = torch.argsort(layout.q_index, stable=True)
            begins = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    q_index, cu_q, k_index, cu_k = (
        x.long().contiguous() for x in (layout.q_index, layout.cu_q, layout.k_index, layout.cu_k)
    )
    return Work(
        False, q_index, cu_q, k_index, cu_k, Sizes(heads, kv_heads, q_len, kv_len, members), layout.cu_q.numel() - 1,
        1 if layout.per_head else heads, layout.per_head, average, order, begins,
    )  # fmt: skip
