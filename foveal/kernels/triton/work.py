"""What a layout asks of the kernels: pieces of rows and keys, and the tiles into which they are cut."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...core.layouts import Groups, KeySelection
from ..call import AttentionCall
from ..list_plan import sharing


@dataclass(frozen=True, eq=False)
class Work:
    """Arguments that all kernels share.

    Attributes:
        lists: pieces are the lists of a ``KeySelection``; else the groups of ``Groups``.
        q_index, cu_q, k_index, cu_k: those of the groups; of lists only ``k_index``, ``(B or 1, heads, blocks, width)``.
        sizes: ``heads, kv_heads, q_len, kv_len``; members: query entries of all groups; ``row_heads``: heads with lists of their own,
            ``per_row``: query heads that share one, ``size``: rows per list, ``width``: keys per list; strides of ``k_index`` along
            batch and heads, 0 where they share.
        pieces: how many. layers: of these, on the second axis of the grid: heads, or sequences times heads.
        per_head: the groups count rows over the heads. of_members: a row is a membership of its own, in their order.
        order, begins: where queries are in several groups: their entries one query after the other, and where each begins.
    """

    lists: bool
    q_index: Tensor
    cu_q: Tensor
    k_index: Tensor
    cu_k: Tensor
    sizes: tuple[int, ...]
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
        return self.sizes[6] * self.sizes[7]

    def tiles(self, side: str, size: int) -> tuple[Tensor, Tensor, int]:
        """Per tile of ``size`` rows (``side`` "q") or keys ("k"): its piece and its first entry, and how many tiles there are."""
        if self.lists:  # the kernels work it out
            return self.k_index, self.k_index, self.pieces * -(-(self.rows if side == "q" else self.sizes[8]) // size)
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
    sizes = (call.q.shape[1], call.k.shape[1], call.base.q_len, call.base.kv_len)
    known = _known.setdefault(layout, {})
    if sizes not in known:
        known[sizes] = _of_groups(layout, sizes, call.q.shape[0])
    return known[sizes]


_known: weakref.WeakKeyDictionary[Groups, dict[tuple[int, ...], Work]] = weakref.WeakKeyDictionary()


def _of_lists(call: AttentionCall, layout: KeySelection) -> Work:
    batch, heads = call.q.shape[:2]
    listed, per_row = sharing(call, layout)
    index = layout.index.contiguous()
    of_batch, of_heads, blocks, width = index.shape
    strides = (0 if of_batch == 1 else of_heads * blocks * width, 0 if of_heads == 1 else blocks * width)
    sizes = (heads, call.k.shape[1], call.base.q_len, call.base.kv_len, 0, listed, per_row, layout.block_size, width)
    return Work(True, index, index, index, index, (*sizes, *strides), blocks, batch * listed)


def _of_groups(layout: Groups, sizes: tuple[int, ...], batch: int) -> Work:
    heads, _, q_len, _ = sizes
    members, average = layout.q_index.numel(), layout.combine == "mean"
    order = begins = None
    if not average:
        count = torch.bincount(layout.q_index, minlength=batch * q_len * (heads if layout.per_head else 1))
        if members and int(count.max()) > 1:
            order = torch.argsort(layout.q_index, stable=True)
            begins = torch.nn.functional.pad(count.cumsum(0), (1, 0))
    q_index, cu_q, k_index, cu_k = (x.contiguous() for x in (layout.q_index, layout.cu_q, layout.k_index, layout.cu_k))
    return Work(
        False, q_index, cu_q, k_index, cu_k, (*sizes, members, 1, 1, 1, 1, 0, 0), layout.cu_q.numel() - 1, 1 if layout.per_head else heads,
        layout.per_head, average, order, begins,
    )  # fmt: skip
