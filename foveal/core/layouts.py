"""The three layouts in which a pattern says which pairs are kept: ``BlockMask``, ``KeySelection``, ``Groups``.

``BlockMask`` is PyTorch's own type, so every mask made here also runs in ``flex_attention`` and every ``BlockMask`` that a
user has runs in foveal's kernels. A layout never needs to repeat the model's own mask: kernels intersect the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, noop_mask

from .base_mask import FULL, PARTIAL, BaseMask, Predicate
from .errors import ShapeError

__all__ = ["BlockMask", "Groups", "KeySelection", "Layout", "block_mask", "block_mask_kinds", "narrow"]


@dataclass(frozen=True, eq=False)
class KeySelection:
    """For each block of query rows, a list of key positions. Its tensors stay as they are: what was checked is not checked again.

    Attributes:
        index: ``(B or 1, heads, blocks, K)`` int64 key indices with heads in {1, Hkv, H}; −1 pads; positions in one list
            are unique.
        block_size: query rows per list; ``blocks = ceil(Nq / block_size)``.
        limit: optional ``(B or 1, Nq)`` int64; row ``i`` sees only listed keys ``< limit[i]``.
    """

    index: Tensor
    block_size: int
    limit: Tensor | None = None

    def validate(self, batch: int, num_heads: int, num_kv_heads: int, q_len: int, kv_len: int) -> None:
        """Raise :class:`ShapeError` unless the lists fit these tensors (called once, at the public door)."""
        if self.block_size < 1:
            raise ShapeError(f"KeySelection.block_size is {self.block_size}; expected at least 1 query row per list.")
        if self.index.dtype != torch.int64:
            raise ShapeError(
                f"KeySelection.index has dtype {self.index.dtype}; expected torch.int64. Call index.long()."
            )
        shape = tuple(self.index.shape)
        blocks = -(-q_len // self.block_size)
        if (
            len(shape) != 4
            or shape[0] not in (1, batch)
            or shape[1] not in (1, num_kv_heads, num_heads)
            or shape[2] != blocks
        ):
            raise ShapeError(
                f"KeySelection.index has shape {shape}; expected (1 or batch={batch}, 1, {num_kv_heads} or {num_heads} heads, "
                f"{blocks} blocks, K) because {q_len} queries in blocks of {self.block_size} make {blocks} blocks."
            )
        if self.limit is not None and tuple(self.limit.shape) not in ((1, q_len), (batch, q_len)):
            raise ShapeError(
                f"KeySelection.limit has shape {tuple(self.limit.shape)}; expected (1 or batch={batch}, q_len={q_len})."
            )
        if self.index.numel() and int(self.index.max()) >= kv_len:
            raise ShapeError(
                f"KeySelection.index names key {int(self.index.max())}; expected indices below kv_len={kv_len}."
            )
        ordered = self.index.sort(-1).values
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if bool(twice.any()):
            where = tuple(int(i) for i in twice.nonzero()[0][:3])
            raise ShapeError(
                f"KeySelection.index repeats a key in the list at (batch, head, block) = {where}; lists hold unique positions."
            )


@dataclass(frozen=True, eq=False)
class Groups:
    """Sets of queries and keys that attend among themselves, as ragged lists.

    Group ``g`` lets queries ``q_index[cu_q[g]:cu_q[g+1]]`` see keys ``k_index[cu_k[g]:cu_k[g+1]]``. The tensors stay as they are:
    what was checked or worked out of them is kept.

    Attributes:
        q_index: ``(Tq,)`` int64. Per head: ``(b·H + h)·Nq + i``; shared by heads: ``b·Nq + i``.
        cu_q, cu_k: ``(G+1,)`` int64 boundaries, starting with 0.
        k_index: ``(Tk,)`` int64. Per head: ``(b·Hkv + h_kv)·Nk + j``; shared: ``b·Nk + j``.
        per_head: which of the two index spaces is meant.
        combine: for a query in several groups, ``"softmax"`` merges them exactly by log-sum-exp (a pair that several
            groups contain counts once per group); ``"mean"`` averages the groups' outputs.
    """

    q_index: Tensor
    cu_q: Tensor
    k_index: Tensor
    cu_k: Tensor
    per_head: bool = False
    combine: Literal["softmax", "mean"] = "softmax"

    @classmethod
    def packed(cls, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None = None) -> Groups:
        """Sequences that lie one after the other along the length of a batch of one; each attends to itself alone.

        Args:
            cu_seqlens_q, cu_seqlens_k: ``(sequences + 1,)`` boundaries, starting with 0; the keys' default to the queries'.

        With ``causal=True`` a row sees the keys up to its own place along the whole length, so the two must be equal then.

        Raises:
            ShapeError: boundaries that are not whole numbers rising from 0, or not as many for keys as for queries.
        """
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cu.dim() != 1 or cu.is_floating_point() or cu.numel() < 1 or int(cu[0]) or bool((cu.diff() < 0).any()):
                raise ShapeError(
                    f"{name} has shape {tuple(cu.shape)}, dtype {cu.dtype} and begins with {cu.flatten()[:6].tolist()}; expected one "
                    "dimension of whole numbers that rise from 0. Pass the cumulative lengths with a leading 0."
                )
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ShapeError(
                f"cu_seqlens_q bounds {cu_seqlens_q.numel() - 1} sequences and cu_seqlens_k {cu_seqlens_k.numel() - 1}; expected as many."
            )
        cu_q, cu_k = cu_seqlens_q.long(), cu_seqlens_k.long()
        return cls(
            torch.arange(int(cu_q[-1]), device=cu_q.device), cu_q, torch.arange(int(cu_k[-1]), device=cu_k.device), cu_k
        )

    def validate(self, batch: int, num_heads: int, num_kv_heads: int, q_len: int, kv_len: int) -> None:
        """Raise :class:`ShapeError` unless boundaries and indices fit these tensors."""
        if self.cu_q.shape != self.cu_k.shape or self.cu_q.dim() != 1:
            raise ShapeError(
                f"Groups.cu_q has shape {tuple(self.cu_q.shape)} and cu_k {tuple(self.cu_k.shape)}; expected the same (G+1,)."
            )
        for name, cu, index in (("q", self.cu_q, self.q_index), ("k", self.cu_k, self.k_index)):
            if int(cu[0]) != 0 or int(cu[-1]) != index.numel() or bool((cu.diff() < 0).any()):
                raise ShapeError(
                    f"Groups.cu_{name} must rise from 0 to {index.numel()}, the length of {name}_index; received {cu.tolist()[:6]}…"
                )
        q_top = batch * (num_heads if self.per_head else 1) * q_len
        k_top = batch * (num_kv_heads if self.per_head else 1) * kv_len
        sides = []
        for name, cu, index, top in (
            ("q_index", self.cu_q, self.q_index, q_top),
            ("k_index", self.cu_k, self.k_index, k_top),
        ):
            low, high = (int(x) for x in torch.aminmax(index)) if index.numel() else (0, -1)
            if low < 0 or high >= top:
                raise ShapeError(f"Groups.{name} spans {low}…{high}; expected 0…{top - 1}.")
            rising = _rises(cu, index)
            counts, ends = _ends(cu, index) if rising else (cu.diff(), index)
            if not rising and _repeats(counts, index, q_top + k_top):
                raise ShapeError(
                    f"Groups.{name} repeats a row inside one group; list each query and key of a group once."
                )
            sides.append((counts, ends))
        (n_q, rows), (n_k, keys) = sides
        unit_q, unit_k = rows // max(q_len, 1), keys // max(kv_len, 1)
        if self.per_head:  # query heads that share a key head may share a group
            unit_q = unit_q // num_heads * num_kv_heads + unit_q % num_heads // (num_heads // num_kv_heads)
        home = torch.zeros_like(n_q)  # of a group's first query, or first key where it has no query
        for n, unit in ((n_k, unit_k), (n_q, unit_q)):
            if unit.numel():
                home = torch.where(n > 0, unit[(n.cumsum(0) - n).clamp(max=unit.numel() - 1)], home)
        for n, unit in ((n_q, unit_q), (n_k, unit_k)):
            strangers = unit != torch.repeat_interleave(home, n)
            if bool(strangers.any()):
                of = torch.repeat_interleave(torch.arange(n.numel(), device=n.device), n)
                raise ShapeError(
                    f"Groups: group {int(of[strangers][0])} joins queries and keys of different {'key heads' if self.per_head else 'batch rows'}; "
                    "make one group for each."
                )


def _rises(cu: Tensor, index: Tensor) -> bool:
    """Whether every group's list rises, as patterns make them: then its two ends stand for all of it."""
    steps = index.diff()
    starts = cu[1:-1]
    steps[starts[(starts > 0) & (starts < index.numel())] - 1] = 1  # from one group to the next
    return not steps.numel() or int(steps.min()) > 0


def _ends(cu: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Entries per group, 2 or 0, and the first and the last entry of every list that has any."""
    some = cu.diff() > 0
    ends = torch.stack([cu[:-1], cu[1:] - 1], -1)[some].flatten()
    return some * 2, index[ends]


def _repeats(counts: Tensor, index: Tensor, top: int) -> bool:
    """Whether a group lists a row below ``top`` twice."""
    group = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    ordered = (group * top + index).sort().values
    return bool((ordered[1:] == ordered[:-1]).any())


Layout = BlockMask | KeySelection | Groups


def block_mask(
    kinds: Tensor,
    block_size: tuple[int, int],
    lengths: tuple[int, int],
    mask_mod: Predicate | None = None,
    *,
    transpose: bool = True,
) -> BlockMask:
    """A ``BlockMask`` from tile kinds, without evaluating any position.

    Args:
        kinds: ``(B or 1, H or 1, nqb, nkb)`` int8 of EMPTY, PARTIAL, FULL.
        block_size: rows and keys per tile.
        lengths: ``(q_len, kv_len)``.
        mask_mod: condition inside PARTIAL tiles; None means that partial tiles are decided by the base mask alone.
        transpose: also build the query-major lists, which FlexAttention's backward needs.
    """
    partial, full = kinds == PARTIAL, kinds == FULL

    def lists(keep: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(keep.to(torch.int8), dim=-1, descending=True, stable=True)
        return keep.sum(-1).to(torch.int32), order.to(torch.int32)

    mask = BlockMask.from_kv_blocks(
        *lists(partial),
        *lists(full),
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=lengths,
        compute_q_blocks=False,
    )
    if transpose:  # as from_kv_blocks(compute_q_blocks=True) does, in a fraction of its time
        mask.q_num_blocks, mask.q_indices = lists(partial.mT.contiguous())
        mask.full_q_num_blocks, mask.full_q_indices = lists(full.mT.contiguous())
    return mask


def block_mask_kinds(mask: BlockMask) -> Tensor:
    """``(B, H, nqb, nkb)`` int8 tile kinds of a ``BlockMask``."""
    nqb = -(-mask.seq_lengths[0] // mask.BLOCK_SIZE[0])
    nkb = -(-mask.seq_lengths[1] // mask.BLOCK_SIZE[1])

    def scatter(count: Tensor, index: Tensor) -> Tensor:
        width = index.shape[-1]
        keep = torch.arange(width, device=index.device) < count[..., None]
        out = torch.zeros(*index.shape[:-1], max(nkb, width) + 1, dtype=torch.bool, device=index.device)
        out.scatter_(-1, torch.where(keep, index, max(nkb, width)).long(), True)
        return out[..., :nqb, :nkb]

    kinds = scatter(mask.kv_num_blocks, mask.kv_indices).to(torch.int8) * PARTIAL
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        kinds[scatter(mask.full_kv_num_blocks, mask.full_kv_indices)] = FULL
    return kinds


def narrow(
    mask: BlockMask | None, base: BaseMask, block_size: tuple[int, int] = (128, 128), *, transpose: bool = True
) -> BlockMask:
    """The pairs of ``mask`` (None: all) that ``base`` also allows, as one ``BlockMask`` for any kernel.

    Tiles that the base mask empties disappear; tiles that it cuts become partial.
    """
    lengths = (base.q_len, base.kv_len)
    if mask is None:
        memo = ("narrow", block_size, transpose)
        if memo not in base.cache:
            base.cache[memo] = block_mask(
                base.block_map(*block_size)[:, None], block_size, lengths, base.mask_mod(), transpose=transpose
            )
        return base.cache[memo]
    if tuple(mask.seq_lengths) != lengths:
        raise ShapeError(
            f"the BlockMask was made for (q_len, kv_len) = {tuple(mask.seq_lengths)}; expected {lengths}. "
            "Build it for these lengths, or pass a Pattern, which follows the length."
        )
    kinds = block_mask_kinds(mask)
    allowed = base.block_map(*mask.BLOCK_SIZE)[:, None]
    joint = torch.minimum(kinds, allowed)
    inner, outer = mask.mask_mod, base.mask_mod()
    free = inner is noop_mask
    whole = kinds == FULL
    b_step, h_step = int(kinds.shape[0] > 1), int(kinds.shape[1] > 1)
    q_block, kv_block = mask.BLOCK_SIZE
    # Whole tiles never ask the mask's own mask_mod; those that the base mask or the end of the keys cuts must be told so.
    ragged = base.kv_len % kv_block != 0 and bool(whole[..., -1].any())
    lookup = not free and (ragged or bool((whole & (allowed == PARTIAL)).any()))

    def both(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if free:
            return outer(b, h, q, k)
        kept = inner(b, h, q, k)
        if lookup:
            kept = kept | whole[b * b_step, h * h_step, q // q_block, k // kv_block]
        return kept & outer(b, h, q, k)

    return block_mask(joint, (q_block, kv_block), lengths, both, transpose=transpose)
