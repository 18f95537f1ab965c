"""MoBA, Mixture of Block Attention (arXiv 2502.13189): every query attends to its own block and the best earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import BaseMask
from ..core.context import SelectContext, State
from ..core.errors import UnsupportedError
from ..core.layouts import Groups, KeySelection, Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..kernels.call import compute_dtype
from ..kernels.pooling import check_same_keys, filled_keys, full_precision
from .base import Pattern
from .routed import (
    Sequence,
    block_means,
    gates,
    head_spans,
    joined,
    own_memberships,
    routed_memberships,
    sequences,
    top_blocks,
)


@register("pattern", "moba")
@dataclass(frozen=True)
class MoBA(Pattern):
    """Every query sees its own block of keys and the ``top_k − 1`` other blocks whose mean key it matches best.

    Attributes:
        block: tokens per block, counted from the first token of each sequence; the last block may be shorter.
        top_k: blocks that a query sees, counting its own.

    A query's score for a block is ``q · mean key``, unscaled, in float32; each query head chooses for itself. On causal
    models only earlier blocks compete, and the own block is cut by causality, so nothing reads ahead; on bidirectional ones
    all blocks do. Decoding chooses by the same rule, from running sums of the blocks (the state): the authors decode with
    full attention instead, which a policy says with ``Dense()`` for decoding.
    """

    block: int = 512
    top_k: int = 3

    def __post_init__(self) -> None:
        check_types(self)
        check_range(self, "block", low=1)
        check_range(self, "top_k", low=1)

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """``Groups`` for many rows, a ``KeySelection`` for one new token; None when ``top_k`` covers all blocks."""
        with full_precision(q):
            return self._select(q, k, ctx, state)

    def _select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State) -> tuple[Layout | None, State]:
        base = ctx.base
        if ctx.role == "cross" or (not base.causal and base.q_len != base.kv_len):
            raise UnsupportedError(
                f"moba gives every query its own block of keys, which cross-attention ({base.q_len} queries, {base.kv_len} keys) "
                "does not have; use block_topk there."
            )
        if base.q_len == 0 or base.kv_len == 0:
            return None, state
        found = sequences(base, self._block_of, ("moba", self.block))
        sums = None if any(len(parts) > 1 for parts in found) else grown(state, k, base, found, self.block)
        if all(int((part.edge.diff() > 0).sum()) <= self.top_k for parts in found for part in parts):
            return None, sums
        if base.q_len == 1 and base.causal and sums is not None:
            return self._decode(q, found, sums), sums
        return self._groups(q, k, found, sums), sums

    def _block_of(self, rank: Tensor) -> Tensor:
        return torch.div(rank, self.block, rounding_mode="floor")

    def _groups(self, q: Tensor, k: Tensor, found: list[list[Sequence]], sums: RoutedSums | None) -> Groups:
        sizes = (q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        members = []
        for b in range(q.shape[0]):
            for part in found[b if len(found) > 1 else 0]:
                keys = k[b, :, part.first_key : part.first_key + part.block.shape[0]]
                means = block_means(keys, part) if sums is None else sums.means(b, part)
                rows = q[b, :, part.first_row : part.first_row + part.rows]
                members.append(own_memberships(part, b, *sizes))
                others = part.others()
                for span in head_spans(q.shape[1], k.shape[1], part):
                    chosen = top_blocks(gates(rows, means, span), others, self.top_k - 1)
                    members.append(routed_memberships(part, chosen, b, span.start, *sizes))
        return joined(members, q.device)

    def _decode(self, q: Tensor, found: list[list[Sequence]], sums: RoutedSums) -> KeySelection:
        lists = []
        inside = torch.arange(self.block, device=q.device)
        for b in range(q.shape[0]):
            part = found[b if len(found) > 1 else 0][0]
            every = slice(0, q.shape[1])
            chosen = top_blocks(gates(q[b], sums.means(b, part), every), part.others(), self.top_k - 1) | part.owned()
            index = chosen[..., 0].to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, : self.top_k]
            place = part.edge[index][..., None] + inside
            taken = chosen[..., 0].gather(1, index)[..., None] & (place < part.edge[index + 1][..., None])
            keys = part.order[place.clamp(max=max(part.order.shape[0] - 1, 0))] if part.order.numel() else place
            lists.append(torch.where(taken, keys, -1).flatten(1))
        width = max(keys.shape[1] for keys in lists)
        padded = [torch.nn.functional.pad(keys, (0, width - keys.shape[1]), value=-1) for keys in lists]
        return KeySelection(torch.stack(padded)[:, :, None], 1)


@dataclass(frozen=True, eq=False)
class RoutedSums:
    """Running sums of the keys of every block, the state of a request; never changed in place.

    Attributes:
        sums: ``(B, C, Hkv, D)`` float32 (float64 for float64 keys).
        absorbed: keys summed so far. origin: rank of key 0 in each sequence. block: keys per block.
    """

    sums: Tensor
    absorbed: int
    origin: tuple[int, ...]
    block: int

    def means(self, b: int, part: Sequence) -> Tensor:
        """``(Hkv, C, D)`` mean keys of one sequence."""
        return (self.sums[b, : part.blocks] / part.edge.diff().clamp(min=1)[:, None, None]).transpose(0, 1)


def grown(state: object, k: Tensor, base: BaseMask, found: list[list[Sequence]], block: int) -> RoutedSums:
    """Sums over all keys written so far, from the new ones alone when ``state`` holds exactly the older ones.

    Raises:
        ShapeError: the state is of another model's keys.
    """
    filled, origin = filled_keys(base), tuple(base.rank[:, 0].tolist())
    old = state if isinstance(state, RoutedSums) else None
    if old is not None:
        check_same_keys("moba", old.sums.shape[2], old.sums.shape[3], k)
        fits = base.causal and (old.block, old.origin, old.absorbed) == (block, origin, filled - base.q_len)
        old = old if fits and old.sums.shape[0] == k.shape[0] else None
    first, blocks = (old.absorbed if old else 0), max(parts[0].blocks for parts in found)
    sums = torch.zeros(k.shape[0], blocks, k.shape[1], k.shape[3], dtype=compute_dtype(k.dtype), device=k.device)
    if old is not None:
        sums[:, : old.sums.shape[1]] = old.sums
    for b in range(k.shape[0]):
        ids = found[b if len(found) > 1 else 0][0].block[first:filled]
        keys = k[b, :, first:filled].transpose(0, 1).to(sums.dtype)
        some = ids >= 0
        sums[b].index_add_(0, ids[some], keys if bool(some.all()) else keys[some])
    return RoutedSums(sums, filled, origin, block)
