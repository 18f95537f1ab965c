"""Linear attention inside sets of different sizes that lie one after the other in a flat array, without padding them alike.

Every set is cut into chunks and only its last chunk is padded, so at most ``chunk − 1`` rows per set are wasted. One gather
lays all chunks out; sums of a set's chunks meet in one state. Sets never mix, not even by rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..core.errors import ShapeError
from .call import compute_dtype
from .linear import (
    Impl,
    LinearState,
    check,
    divided,
    in_cpp,
    joined_state,
    linear_attention,
    native_product,
    with_ones,
)
from .linear_chunks import Product, sums

CHOICES = (8, 16, 32, 64)
"""Rows per chunk to choose from without being asked."""
CHUNK_COST = 6
"""What a chunk costs beside its rows, in rows: its state is written and read."""
BLOCK = 1 << 20
"""State elements of the chunks that are worked on at once."""


@torch.compiler.disable  # sizes depend on the data
def linear_attention_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    causal: bool = False,
    normalise: bool = True,
    eps: float = 0.0,
    state: LinearState | None = None,
    chunk: int | None = None,
    impl: Impl = "fast",
) -> tuple[Tensor, LinearState]:
    """Linear attention inside each of W sets.

    Args:
        q: ``(T, H, F)`` mapped queries. k: ``(T, Hkv, F)`` mapped keys. v: ``(T, Hkv, Dv)``.
        cu_seqlens: ``(W + 1,)`` int64 or int32, from 0 to T, not falling: set w holds rows ``cu[w]`` to ``cu[w + 1] − 1``, in
            their order. A set may be empty.
        causal, normalise, eps: as in :func:`foveal.kernels.linear.linear_attention`.
        state: one per set, with W in the place of B.
        chunk: rows per chunk; default what wastes least: a power of two from 8 to 64, or the largest set when it is that small.
            Of the torch form.
        impl: as in :func:`foveal.kernels.linear.linear_attention`; ``"reference"`` is a loop over sets in float64.

    Returns:
        ``out`` ``(T, H, Dv)`` in v's dtype, and the state of every set.

    Raises:
        ShapeError: shapes, dtypes or boundaries that do not fit. ConfigError: an unknown ``impl``, a ``chunk`` below 1.
        UnsupportedError: ``impl="native"`` where it cannot run.
    """
    heads_first = [x.transpose(-3, -2) if x.dim() == 3 else x for x in (q, k, v)]
    check(heads_first[0], heads_first[1], heads_first[2], impl, 1 if chunk is None else chunk)
    if q.dim() != 3 or q.shape[0] != k.shape[0]:
        raise ShapeError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; expected (T, H, F) and (T, Hkv, F).")
    check_cu(cu_seqlens, q.shape[0])
    dtype = torch.float64 if impl == "reference" else compute_dtype(v.dtype)
    count, (hkv, f) = len(cu_seqlens) - 1, k.shape[1:]
    start = joined_state(state, (count, hkv, f, v.shape[-1]), normalise, dtype, v.device)
    if impl == "reference":
        return _reference(q, k, v, cu_seqlens, causal, normalise, eps, state)
    qs, ks, vs = (x.unflatten(1, (hkv, x.shape[1] // hkv)) for x in (q, k, v))
    if in_cpp(q, v, impl):
        heads = [x.permute(1, 2, 0, 3)[None] for x in (qs, ks, vs)]  # (1, Hkv, G, T, C)
        out, end = native_product(
            heads[0], heads[1], heads[2], start, cu_seqlens.long().contiguous(), causal, normalise, eps
        )
        out = out[0].permute(2, 0, 1, 3).flatten(1, 2)
    else:
        out, end = sums(qs, ks, with_ones(vs, normalise), start, Pieces.cut(cu_seqlens, chunk).product(causal))
        out = divided(out.flatten(1, 2), normalise, eps)
    out = out.to(v.dtype)
    if normalise:
        return out, LinearState(end[..., :-1], end[..., -1])
    keys = k.to(dtype)
    of_row = torch.repeat_interleave(torch.arange(count, device=k.device), cu_seqlens.long().diff())
    total = keys.new_zeros(count, hkv, f).index_add(0, of_row, keys)
    return out, LinearState(end, total if state is None else total + state.k)


def check_cu(cu_seqlens: Tensor, rows: int) -> None:
    """Raise :class:`ShapeError` unless ``cu_seqlens`` runs from 0 to ``rows`` without falling."""
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ShapeError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; expected (sets + 1,) of int32 or int64."
        )
    if int(cu_seqlens[0]) or int(cu_seqlens[-1]) != rows or bool((cu_seqlens.diff() < 0).any()):
        raise ShapeError(
            f"cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}; expected 0 to {rows}, never falling."
        )


def _reference(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, causal: bool, normalise: bool, eps: float, state: LinearState | None
) -> tuple[Tensor, LinearState]:
    """The definition: one set after the other."""
    outs, kvs, ks = [], [], []
    for w, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        own = None if state is None else LinearState(state.kv[w : w + 1], state.k[w : w + 1])
        parts = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
        out, end = linear_attention(*parts, causal=causal, normalise=normalise, eps=eps, state=own, impl="reference")
        outs.append(out[0].transpose(0, 1))
        kvs.append(end.kv)
        ks.append(end.k)
    if not outs:
        shape = (0, k.shape[1], k.shape[2])
        return v.new_zeros(0, q.shape[1], v.shape[-1]), LinearState(
            v.new_zeros(*shape, v.shape[-1], dtype=torch.float64), v.new_zeros(shape, dtype=torch.float64)
        )
    return torch.cat(outs), LinearState(torch.cat(kvs), torch.cat(ks))


def _cheapest(sizes: Tensor) -> int:
    """The chunk size for which all chunks together cost least."""
    largest = int(sizes.max()) if len(sizes) else 0
    choices = (*CHOICES, largest) if 0 < largest <= CHOICES[-1] else CHOICES
    rows = torch.tensor(choices, device=sizes.device)
    counts = ((sizes[:, None] + rows - 1) // rows).sum(0)
    return choices[int((counts * (rows + CHUNK_COST)).argmin())]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Sets cut into n chunks of g rows.

    Attributes:
        rows: ``(n, g)`` int64 row of every place; places past the end of a set repeat its last row.
        filled: ``(n, g)`` bool, False on these.
        owner: ``(n,)`` int64, the set of each chunk. step: ``(n,)`` int64, which chunk of its set it is.
        whole: no place is padded and rows are in order, so that nothing need be gathered.
    """

    rows: Tensor
    filled: Tensor
    owner: Tensor
    step: Tensor
    whole: bool

    @classmethod
    def cut(cls, cu_seqlens: Tensor, chunk: int | None = None) -> Pieces:
        """Cut the sets ``cu_seqlens`` into chunks of ``chunk`` rows, or of a size that fits their mean."""
        cu = cu_seqlens.long()
        sizes = cu.diff()
        chunk = _cheapest(sizes) if chunk is None else chunk
        counts = (sizes + chunk - 1) // chunk
        owner = torch.repeat_interleave(torch.arange(len(sizes), device=cu.device), counts)
        step = torch.arange(len(owner), device=cu.device) - (counts.cumsum(0) - counts)[owner]
        rows = cu[owner, None] + step[:, None] * chunk + torch.arange(chunk, device=cu.device)
        last = cu[owner + 1, None]
        filled = rows < last
        return cls(torch.minimum(rows, last - 1), filled, owner, step, bool(filled.all()))

    def product(self, causal: bool) -> Product:
        """The sums of ``foveal.kernels.linear_chunks`` over tensors ``(T, Hkv, G, C)`` and states ``(W, Hkv, F, D)``."""
        return self._steps if causal else self._all

    def _all(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        end = state.clone(memory_format=torch.contiguous_format)
        blocks = self._blocks(state)
        for block in blocks:
            added = self._take(k, block, state.dtype, hide=True).mT @ self._take(v, block, state.dtype)
            end.index_add_(0, self.owner[block], added)
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=state.dtype, device=q.device)
        for block in blocks:
            met = self._take(q, block, state.dtype) @ end.index_select(0, self.owner[block])
            self._put(out, block, met)
        return out, end

    def _steps(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """First chunks of all sets at once, then second chunks, …; the last ones first when reversed."""
        end = state.clone(memory_format=torch.contiguous_format)
        out = torch.empty(*q.shape[:3], v.shape[-1], dtype=state.dtype, device=q.device)
        g = self.rows.shape[1]
        at = torch.arange(g, device=q.device)
        row, column = at.repeat(q.shape[2])[:, None], at.repeat(k.shape[2])[None, :]
        hide = row > column if reverse else row < column
        order = self.step.argsort(stable=True)
        ends = torch.bincount(self.step).cumsum(0).tolist()
        bounds = list(pairwise([0, *ends]))
        for a, b in reversed(bounds) if reverse else bounds:
            for part in order[a:b].split(self._per_block(state)):
                qc, vc = self._take(q, part, state.dtype), self._take(v, part, state.dtype)
                kc = self._take(k, part, state.dtype, hide=True)
                owner = self.owner[part]
                scores = (qc @ kc.mT).masked_fill_(hide, 0.0)
                self._put(out, part, scores @ vc + qc @ end.index_select(0, owner))
                end.index_add_(0, owner, kc.mT @ vc)
        return out, end

    def _per_block(self, state: Tensor) -> int:
        return max(1, BLOCK // max(1, state[:1].numel()))

    def _blocks(self, state: Tensor) -> list[Tensor]:
        return list(torch.arange(len(self.owner), device=state.device).split(self._per_block(state)))

    def _take(self, x: Tensor, block: Tensor, dtype: torch.dtype, hide: bool = False) -> Tensor:
        """Chunks ``block`` of ``x`` ``(T, Hkv, G, C)`` as ``(n, Hkv, G·g, C)``, zeros past the end of a set when ``hide``."""
        _, heads, groups, width = x.shape
        n, g = len(block), self.rows.shape[1]
        rows = self.rows[block]
        lanes = torch.arange(heads * groups, device=x.device)[None, :, None]
        index = rows[:, None, :] * (heads * groups) + lanes  # (n, heads · groups, g)
        out = x.reshape(-1, width).index_select(0, index.reshape(-1)).to(dtype).view(n, heads * groups, g, width)
        if hide and not self.whole:
            out = out.masked_fill(~self.filled[block][:, None, :, None], 0.0)
        return out.view(n, heads, groups * g, width)

    def _put(self, out: Tensor, block: Tensor, part: Tensor) -> None:
        """Write chunks back; the inverse of :meth:`_take`."""
        _, heads, groups, width = out.shape
        lanes = torch.arange(heads * groups, device=out.device)[None, :, None]
        index = self.rows[block][:, None, :] * (heads * groups) + lanes
        flat = out.view(-1, width)
        part = part.reshape(-1, width)
        if self.whole:
            flat.index_copy_(0, index.reshape(-1), part)
            return
        filled = self.filled[block][:, None, :].expand_as(index).reshape(-1).nonzero()[:, 0]
        flat.index_copy_(0, index.reshape(-1)[filled], part[filled])
