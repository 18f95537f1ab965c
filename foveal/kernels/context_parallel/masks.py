"""What one shard of queries sees of another shard of keys: again an interval per row, so that any kernel can run it.

The model's mask over the whole sequence is one interval of keys per row (causal, window, documents, chunks). A shard is a
rising list of places, so the visible keys inside it are an interval too, found by bisection. The three cases of the
published rings (whole, first half of the keys, second half of the queries) come out as the box around what is visible.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.base_mask import BaseMask, Predicate
from ...core.errors import ShapeError
from .partition import Partition


@dataclass(frozen=True, eq=False)
class Part:
    """The box of rows and keys of two shards that contains every visible pair.

    Attributes:
        rows, keys: slices into the shards. base: the mask inside the box. pairs: visible pairs in one head, all batch rows.
    """

    rows: slice
    keys: slice
    base: BaseMask
    pairs: int


def placed(mask: BaseMask, partition: Partition) -> BaseMask:
    """The mask of the whole sequence over the partition's places, padding included.

    Raises:
        ShapeError: the mask is not one of ``partition.total`` queries and keys.
    """
    total, length = partition.total, partition.length
    if (mask.q_len, mask.kv_len) != (total, total):
        raise ShapeError(
            f"the mask has {mask.q_len} queries and {mask.kv_len} keys; expected {total} of both, those of the whole sequence."
        )
    if length == total:
        return mask
    places = partition.places.to(mask.device)
    empty = mask.lo >= mask.hi
    lo, hi = (torch.zeros(mask.lo.shape[0], length, dtype=torch.long, device=mask.device) for _ in range(2))
    lo[:, places] = torch.where(empty, 0, places[mask.lo.clamp(max=total - 1)])
    hi[:, places] = torch.where(empty, 0, places[(mask.hi - 1).clamp(min=0)] + 1)
    real = (partition.tokens >= 0).to(mask.device)
    before = torch.nn.functional.pad((~real).long().cumsum(0), (1, 0))
    valid = None
    if mask.valid is not None:
        valid = torch.zeros(mask.valid.shape[0], length, dtype=torch.bool, device=mask.device)
        valid[:, places] = mask.valid
    elif bool((before[hi] > before[lo]).any()):
        valid = real[None]
    rank = torch.arange(length, device=mask.device)[None]
    tokens = partition.tokens.to(mask.device).clamp(min=0)
    predicate = None if mask.predicate is None else _through(mask.predicate, tokens, tokens)
    return BaseMask(length, length, lo, hi, 0, mask.causal, rank, valid, predicate)


def part(mask: BaseMask, rows: Tensor, keys: Tensor) -> Part | None:
    """The visible pairs between two shards of places under a :func:`placed` mask; None when there are none."""
    rows, keys = rows.to(mask.device), keys.to(mask.device)
    lo = torch.searchsorted(keys, mask.lo[:, rows].contiguous())
    hi = torch.maximum(torch.searchsorted(keys, mask.hi[:, rows].contiguous()), lo)
    seeing = (lo < hi).any(0).nonzero()[:, 0]
    if not seeing.numel():
        return None
    r = slice(int(seeing[0]), int(seeing[-1]) + 1)
    lo, hi = lo[:, r], hi[:, r]
    some = lo < hi
    c = slice(int(lo[some].min()), int(hi[some].max()))
    lo, hi = torch.where(some, lo - c.start, 0), torch.where(some, hi - c.start, 0)
    q_len, kv_len = r.stop - r.start, c.stop - c.start
    valid = None if mask.valid is None else mask.valid[:, keys[c]]
    if valid is not None and bool(valid.all()):
        valid = None
    predicate = None if mask.predicate is None else _through(mask.predicate, rows[r], keys[c])
    base = _named(lo, hi, q_len, kv_len) if valid is None and predicate is None else None
    if base is None:
        rank = torch.arange(kv_len, device=mask.device)[None]
        base = BaseMask(q_len, kv_len, lo, hi, 0, False, rank, valid, predicate)
        base.cache |= {name: mask.cache[name] for name in ("predicate_batch",) if name in mask.cache}
    return Part(r, c, base, int(base.area().sum()))


def _named(lo: Tensor, hi: Tensor, q_len: int, kv_len: int) -> BaseMask | None:
    """The plain full or causal mask where the intervals are just that: kernels know those by name."""
    if lo.shape[0] > 1 or bool(lo.any()):
        return None
    for causal in (False, True):
        plain = BaseMask.build(q_len, kv_len, causal=causal, device=lo.device)
        if (not causal or q_len == kv_len) and torch.equal(plain.hi, hi):
            return plain
    return None


def _through(predicate: Predicate, rows: Tensor, keys: Tensor) -> Predicate:
    """The same predicate asked by indices into ``rows`` and ``keys``."""

    def asked(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return predicate(b, h, rows[q], keys[k])

    return asked
