"""The mask that the model itself demands: causality, padding, sliding windows, chunks, packed documents.

Every such mask is, per query row, one interval of key positions minus the padding. So it is stored as O(N) numbers,
``lo`` and ``hi`` per row and ``valid`` per key, and nothing of size N×N is ever built. What does not fit (image tokens
that see each other both ways, a user's own 4-D mask) is kept as an elementwise predicate on top.

Words used everywhere: ``shift`` is the key index of query row 0 (queries ``[0, q_len)`` sit at key indices
``[shift, shift + q_len)``); ``window`` counts the query itself; a key's ``rank`` is its position inside its own
sequence, so that "the first tokens" are right under left padding and in packed documents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import ShapeError

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(b, h, q, k) -> bool``, elementwise over broadcastable index tensors; q and k are row and key indices from 0."""

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(eq=False)
class BaseMask:
    """Which pairs the host allows; patterns choose a subset of these.

    Attributes:
        q_len, kv_len: numbers of query rows and keys.
        lo, hi: ``(B or 1, q_len)`` int64; row ``i`` may see keys ``lo[i] <= k < hi[i]``.
        shift: key index of query row 0.
        causal: whether ``hi`` never exceeds the row's own key index + 1.
        valid: ``(B or 1, kv_len)`` bool, False on padding, or None when every key is real.
        rank: ``(B or 1, kv_len)`` int64, position of each key inside its own sequence.
        predicate: further elementwise condition, or None.
        plain: True when this is exactly "causal or full, nothing else", so that caches may be shared between calls.
    """

    q_len: int
    kv_len: int
    lo: Tensor
    hi: Tensor
    shift: int
    causal: bool
    rank: Tensor
    valid: Tensor | None = None
    predicate: Predicate | None = None
    plain: bool = False
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        q_len: int,
        kv_len: int,
        *,
        causal: bool,
        shift: int | None = None,
        window: int | None = None,
        chunk: int | None = None,
        chunk_start: Tensor | None = None,
        valid: Tensor | None = None,
        segments: Tensor | None = None,
        kv_offset: int = 0,
        predicate: Predicate | None = None,
        device: torch.device | str = "cpu",
    ) -> BaseMask:
        """Build from the words that models use.

        Args:
            q_len, kv_len: numbers of query rows and keys.
            causal: a row sees no key after its own position.
            shift: key index of row 0; default ``kv_len - q_len`` (bottom-right alignment) when causal, else 0.
            window: sliding window, counting the query; when not causal it opens to both sides.
            chunk: keys visible only inside the row's own chunk of this many positions.
            chunk_start: ``(B,)`` first real position, where chunk 0 begins (left padding).
            valid: ``(B, kv_len)`` bool, False on padding keys.
            segments: ``(B, kv_len)`` non-decreasing document numbers; needs ``q_len == kv_len``.
            kv_offset: absolute position of key 0 (rolling caches).

        Raises:
            ShapeError: when ``segments`` or ``valid`` do not fit.
        """
        shift = (kv_len - q_len if causal else 0) if shift is None else int(shift)
        lo = torch.zeros(q_len, dtype=torch.long, device=device)
        if causal:
            hi = torch.arange(shift + 1, shift + q_len + 1, device=device)
            if shift < 0 or shift + q_len > kv_len:
                hi = hi.clamp(0, kv_len)
        else:
            hi = torch.full_like(lo, kv_len)
        if window is not None or chunk is not None:
            own = torch.arange(shift, shift + q_len, device=device)  # key index of each row
        if window is not None:
            lo = torch.maximum(lo, own - window + 1)
            if not causal:
                hi = torch.minimum(hi, own + window)
        lo, hi = lo[None], hi[None]
        rank = torch.arange(kv_offset, kv_offset + kv_len, device=device)[None]
        if chunk is not None:
            start = torch.zeros(1, dtype=torch.long, device=device) if chunk_start is None else chunk_start.to(device)
            absolute = own[None] + kv_offset - start[:, None]
            begin = torch.div(absolute, chunk, rounding_mode="floor") * chunk + start[:, None] - kv_offset
            lo, hi = torch.maximum(lo, begin), torch.minimum(hi, begin + chunk)
        if segments is not None:
            if segments.shape[-1] != kv_len or q_len != kv_len:
                raise ShapeError(
                    f"segments has shape {tuple(segments.shape)} for {q_len} queries and {kv_len} keys; packed documents "
                    "need one number per key and as many queries as keys. Pass use_cache=False."
                )
            segments = segments.to(device).contiguous()
            first = torch.searchsorted(segments, segments, right=False)
            after = torch.searchsorted(segments, segments, right=True)
            lo, hi = torch.maximum(lo, first), torch.minimum(hi, after)
            rank = rank - first
        if valid is not None:
            valid = valid.to(device=device, dtype=torch.bool)
            if valid.shape[-1] != kv_len:
                raise ShapeError(f"valid has shape {tuple(valid.shape)}; expected (batch, kv_len={kv_len}).")
            if bool(valid.all()):
                valid = None
            elif segments is None:
                rank = valid.long().cumsum(-1) - 1 + kv_offset
        if window is not None or chunk is not None or segments is not None:  # elsewhere rows begin at key 0
            lo = lo.clamp(max=kv_len)
            hi = torch.maximum(hi, lo)
        plain = (
            window is None
            and chunk is None
            and segments is None
            and valid is None
            and predicate is None
            and kv_offset == 0
        )
        return cls(q_len, kv_len, lo, hi, shift, causal, rank, valid, predicate, plain)

    @property
    def device(self) -> torch.device:
        return self.lo.device

    @property
    def batch(self) -> int:
        """1 when all sequences of the batch share one mask, else the batch size."""
        return max(self.lo.shape[0], 1 if self.valid is None else self.valid.shape[0])

    def key(self) -> tuple[Any, ...] | None:
        """Hashable identity for caches that outlive this object; None when the mask is not plain."""
        return (self.q_len, self.kv_len, self.shift, self.causal, str(self.device)) if self.plain else None

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Elementwise: may row ``q`` of batch ``b`` see key ``k``? Indices outside the lengths give False."""
        inside = (q < self.q_len) & (k < self.kv_len) & (q >= 0) & (k >= 0)
        q, k = q.clamp(0, max(self.q_len - 1, 0)), k.clamp(0, max(self.kv_len - 1, 0))
        rows = b if self.lo.shape[0] > 1 else torch.zeros_like(b)
        ok = inside & (k >= self.lo[rows, q]) & (k < self.hi[rows, q])
        if self.valid is not None:
            ok = ok & self.valid[b if self.valid.shape[0] > 1 else torch.zeros_like(b), k]
        if self.predicate is not None:
            ok = ok & self.predicate(b, h, q, k)
        return ok

    def mask_mod(self) -> Predicate:
        """The same condition as a FlexAttention ``mask_mod`` (no bounds checks, captured tensors only)."""
        lo, hi, valid, predicate = self.lo, self.hi, self.valid, self.predicate
        shared, valid_shared = lo.shape[0] == 1, valid is None or valid.shape[0] == 1

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            row = b * 0 if shared else b
            ok = (k >= lo[row, q]) & (k < hi[row, q])
            if valid is not None:
                ok = ok & valid[b * 0 if valid_shared else b, k]
            if predicate is not None:
                ok = ok & predicate(b, h, q, k)
            return ok

        return allowed

    def dense(self, batch: int = 1) -> Tensor:
        """``(batch, q_len, kv_len)`` bool. For the reference and for tests only: O(N²)."""
        b = torch.arange(batch, device=self.device)[:, None, None]
        q = torch.arange(self.q_len, device=self.device)[None, :, None]
        k = torch.arange(self.kv_len, device=self.device)[None, None, :]
        return self.allowed(b, torch.zeros_like(b), q, k).expand(batch, self.q_len, self.kv_len)

    def block_map(self, q_block: int, kv_block: int) -> Tensor:
        """``(batch, nqb, nkb)`` int8 with EMPTY, PARTIAL or FULL for every tile, from the intervals alone.

        A tile that runs over the end of the rows or keys counts as FULL when everything inside the lengths is allowed.
        FULL and EMPTY are exact promises; PARTIAL may be pessimistic.
        """
        memo = ("block_map", q_block, kv_block)
        if memo not in self.cache:
            self.cache[memo] = self._block_map(q_block, kv_block)
        return self.cache[memo]

    def _block_map(self, q_block: int, kv_block: int) -> Tensor:
        nqb, nkb = -(-self.q_len // q_block), -(-self.kv_len // kv_block)
        start = torch.arange(nkb, device=self.device) * kv_block
        end = (start + kv_block).clamp(max=self.kv_len)
        empty_row = self.lo >= self.hi
        big = self.kv_len + 1

        def reduce(x: Tensor, fill: int, how: str) -> Tensor:
            x = torch.nn.functional.pad(x, (0, nqb * q_block - self.q_len), value=fill)
            return getattr(x.view(x.shape[0], nqb, q_block), how)(-1)

        lo_min = reduce(torch.where(empty_row, big, self.lo), big, "amin")
        hi_max = reduce(torch.where(empty_row, -1, self.hi), -1, "amax")
        lo_max = reduce(torch.where(empty_row, big, self.lo), -1, "amax")
        hi_min = reduce(torch.where(empty_row, -1, self.hi), big, "amin")
        touches = (lo_min[..., None] < end) & (hi_max[..., None] > start)
        covers = (lo_max[..., None] <= start) & (hi_min[..., None] >= end)
        if self.valid is not None:
            padded = torch.nn.functional.pad(self.valid, (0, nkb * kv_block - self.kv_len))
            count = padded.view(-1, nkb, kv_block).sum(-1)[:, None, :]
            touches, covers = touches & (count > 0), covers & (count == end - start)
        if self.predicate is not None:
            seen, all_seen = self._predicate_map(nqb, nkb, q_block, kv_block)
            touches, covers = touches & seen, covers & all_seen
        out = touches.to(torch.int8)
        out[covers & touches] = FULL
        return out

    def _predicate_map(self, nqb: int, nkb: int, q_block: int, kv_block: int) -> tuple[Tensor, Tensor]:
        assert self.predicate is not None
        batch = self.batch if self.batch > 1 else int(self.cache.get("predicate_batch", 1))
        b = torch.arange(batch, device=self.device)[:, None, None]
        k = torch.arange(self.kv_len, device=self.device)[None, None, :]
        pad = (0, nkb * kv_block - self.kv_len)
        some, every = [], []
        for u in range(nqb):
            q = torch.arange(u * q_block, min((u + 1) * q_block, self.q_len), device=self.device)[None, :, None]
            ok = self.predicate(b, torch.zeros_like(b), q, k).expand(batch, q.shape[1], self.kv_len)
            some.append(torch.nn.functional.pad(ok.any(1), pad).view(batch, nkb, kv_block).any(-1))
            every.append(torch.nn.functional.pad(ok.all(1), pad, value=True).view(batch, nkb, kv_block).all(-1))
        return torch.stack(some, 1), torch.stack(every, 1)

    def area(self) -> Tensor:
        """``(batch,)`` int64: number of allowed pairs, exact, without building them (except under a predicate)."""
        if "area" not in self.cache:
            if self.predicate is not None:
                batch = self.batch if self.batch > 1 else int(self.cache.get("predicate_batch", 1))
                self.cache["area"] = sum_rows(self, batch)
            elif self.valid is None:
                self.cache["area"] = (self.hi - self.lo).sum(-1)
            else:
                before = torch.nn.functional.pad(self.valid.long().cumsum(-1), (1, 0))
                rows = max(before.shape[0], self.lo.shape[0])
                before, lo, hi = before.expand(rows, -1), self.lo.expand(rows, -1), self.hi.expand(rows, -1)
                self.cache["area"] = (before.gather(1, hi) - before.gather(1, lo)).sum(-1)
        return self.cache["area"]

    def crop_keys(self, kv_len: int) -> BaseMask:
        """The same mask over the first ``kv_len`` keys (keys of a static cache that nothing has been written to)."""
        if kv_len == self.kv_len:
            return self
        hi = self.hi.clamp(max=kv_len)
        valid = None if self.valid is None else self.valid[:, :kv_len]
        if valid is not None and bool(valid.all()):
            valid = None
        plain = self.plain or (
            self.causal
            and valid is None
            and self.predicate is None
            and bool((self.lo == 0).all())
            and int(self.rank[0, 0]) == 0
        )
        return BaseMask(
            self.q_len, kv_len, torch.minimum(self.lo, hi), hi, self.shift, self.causal, self.rank[:, :kv_len], valid,
            self.predicate, plain, {k: v for k, v in self.cache.items() if k == "predicate_batch"},
        )  # fmt: skip

    def to(self, device: torch.device | str) -> BaseMask:
        """The same mask with its tensors on ``device``."""
        if torch.device(device) == self.device:
            return self
        valid = None if self.valid is None else self.valid.to(device)
        return BaseMask(
            self.q_len, self.kv_len, self.lo.to(device), self.hi.to(device), self.shift, self.causal,
            self.rank.to(device), valid, self.predicate, self.plain,
        )  # fmt: skip


def sum_rows(base: BaseMask, batch: int, rows: int = 256) -> Tensor:
    """``(batch,)`` allowed pairs counted tile row by tile row; the exact, slow way that serves opaque predicates."""
    total = torch.zeros(batch, dtype=torch.long, device=base.device)
    b = torch.arange(batch, device=base.device)[:, None, None]
    k = torch.arange(base.kv_len, device=base.device)[None, None, :]
    for start in range(0, base.q_len, rows):
        q = torch.arange(start, min(start + rows, base.q_len), device=base.device)[None, :, None]
        total += base.allowed(b, torch.zeros_like(b), q, k).expand(batch, q.shape[1], base.kv_len).sum((1, 2))
    return total
