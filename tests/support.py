"""What tests compare against: a host's mask written as a sentence, and attention as a loop over single tokens.

Neither uses ``foveal.core.base_mask`` nor ``foveal.kernels``: a mistake there cannot hide here.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.layouts import BlockMask, Groups, KeySelection, Layout
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute


@dataclass(frozen=True)
class Host:
    """What a model demands of its attention, in words.

    Attributes:
        q_len, kv_len, causal, shift, window, chunk: as in ``BaseMask.build``.
        pads: per batch row, numbers of padding keys ``(left, right)``; ``()`` is a batch of one without padding.
        documents: per batch row, the lengths of the packed documents; ``()`` for none.
        after: tokens of the request that came before the first query (``q_offset``).
    """

    q_len: int
    kv_len: int
    causal: bool = True
    shift: int | None = None
    window: int | None = None
    chunk: int | None = None
    pads: tuple[tuple[int, int], ...] = ()
    documents: tuple[tuple[int, ...], ...] = ()
    after: int = 0

    @property
    def batch(self) -> int:
        return max(len(self.pads), len(self.documents), 1)

    @property
    def first(self) -> int:
        """Key index of query row 0."""
        if self.shift is not None:
            return self.shift
        return self.kv_len - self.q_len if self.causal else 0

    def real(self, b: int, j: np.ndarray) -> np.ndarray:
        """Whether key ``j`` is a token and not padding."""
        left, right = self.pads[b] if self.pads else (0, 0)
        return (left <= j) & (j < self.kv_len - right)

    def document(self, b: int, j: np.ndarray) -> np.ndarray:
        """Number of the document that token ``j`` belongs to."""
        lengths = self.documents[b] if self.documents else (self.kv_len,)
        return np.repeat(np.arange(len(lengths)), lengths)[j.clip(0, self.kv_len - 1)]

    def rank(self, b: int, j: np.ndarray) -> np.ndarray:
        """Position of key ``j`` inside its own sequence."""
        if self.documents:
            return j - np.cumsum((0, *self.documents[b]))[self.document(b, j)]
        return j - (self.pads[b][0] if self.pads else 0)

    def allows(self, b: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Whether row ``i`` may see key ``j``; elementwise."""
        own = self.first + i
        seen = self.real(b, j) & (own == own)
        if self.causal:
            seen &= j <= own
        if self.window is not None:
            seen &= (own - j < self.window) & (j - own < self.window)
        if self.documents:
            seen &= self.document(b, j) == self.document(b, own)
        if self.chunk is not None:
            start = self.pads[b][0] if self.pads else 0
            seen &= (own - start) // self.chunk == (j - start) // self.chunk
        return seen

    def base(self) -> BaseMask:
        """The same demand as foveal's own object."""
        valid = segments = start = None
        keys = np.arange(self.kv_len)
        if self.pads:
            valid = torch.from_numpy(np.stack([self.real(b, keys) for b in range(self.batch)]))
            start = torch.tensor([left for left, _ in self.pads])
        if self.documents:
            segments = torch.from_numpy(np.stack([self.document(b, keys) for b in range(self.batch)]))
        return BaseMask.build(
            self.q_len, self.kv_len, causal=self.causal, shift=self.shift, window=self.window, chunk=self.chunk,
            chunk_start=start, valid=valid, segments=segments,
        )  # fmt: skip

    def dense(self) -> np.ndarray:
        """``(B, Nq, Nk)`` bool."""
        rows, keys = np.arange(self.q_len)[:, None], np.arange(self.kv_len)[None]
        return np.stack([self.allows(b, rows, keys) for b in range(self.batch)])

    def cut(self, first: int, last: int) -> Host:
        """The same request when only rows ``first … last−1`` are new and later tokens do not exist yet."""
        pads = tuple((left, max(0, right - (self.kv_len - last))) for left, right in self.pads)
        return replace(self, q_len=last - first, kv_len=last, shift=first, pads=pads, after=first)

    def alone(self, b: int) -> Host:
        """Row ``b`` of the batch as a batch of one."""
        return replace(self, pads=self.pads[b : b + 1], documents=self.documents[b : b + 1])


def context(host: Host, scale: float | None = None, **extra: Any) -> SelectContext:
    """What a pattern is told about this host."""
    return SelectContext(base=host.base(), scale=scale, q_offset=host.after, **extra)


def tensors(
    host: Host,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 8,
    dim_v: int = 6,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v; later tokens do not change earlier ones' values."""
    make = torch.Generator().manual_seed(seed)
    sizes = ((heads, host.q_len, dim), (kv_heads, host.kv_len, dim), (kv_heads, host.kv_len, dim_v))
    q, k, v = (torch.randn(host.batch, *size, generator=make, dtype=torch.float64).to(dtype) for size in sizes)
    return q, k, v


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout | None,
    host: Host,
    impl: str = "gather",
    scale: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """``(out, lse)`` of one implementation under a host's mask."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return compute(AttentionCall(q, k, v, layout, host.base(), scale, **options), impl)


def listed(layout: Layout | None, b: int, h: int, i: int, shape: tuple[int, int, int, int]) -> list[Any]:
    """Keys that the layout names for one query, one list for each set that the query belongs to.

    ``shape`` is ``(H, Hkv, Nq, Nk)``.
    """
    heads, kv_heads, q_len, kv_len = shape
    if layout is None:
        return [range(kv_len)]
    if isinstance(layout, BlockMask):
        return [_tiles(layout, b, h, i, kv_len)]
    if isinstance(layout, KeySelection):
        per_list = heads // layout.index.shape[1]
        row = layout.index[b if layout.index.shape[0] > 1 else 0, h // per_list, i // layout.block_size].tolist()
        end = kv_len if layout.limit is None else int(layout.limit[b if layout.limit.shape[0] > 1 else 0, i])
        return [[j for j in row if 0 <= j < end]]
    return _sets(layout, b, h, i, (heads, kv_heads, q_len, kv_len))


def _tiles(mask: BlockMask, b: int, h: int, i: int, kv_len: int) -> np.ndarray:
    at = (b if mask.kv_indices.shape[0] > 1 else 0, h if mask.kv_indices.shape[1] > 1 else 0, i // mask.BLOCK_SIZE[0])
    cut = _columns(mask.kv_indices[at][: int(mask.kv_num_blocks[at])], mask.BLOCK_SIZE[1], kv_len)
    if cut.numel():
        cut = cut[mask.mask_mod(torch.tensor(b), torch.tensor(h), torch.tensor(i), cut).expand(cut.shape)]
    if mask.full_kv_num_blocks is None:
        return cut.numpy()
    whole = _columns(mask.full_kv_indices[at][: int(mask.full_kv_num_blocks[at])], mask.BLOCK_SIZE[1], kv_len)
    return torch.cat([cut, whole]).numpy()


def _columns(tiles: Tensor, width: int, kv_len: int) -> Tensor:
    keys = (tiles.long()[:, None] * width + torch.arange(width)).view(-1)
    return keys[keys < kv_len]


_owners: weakref.WeakKeyDictionary[Groups, dict[int, list[list[int]]]] = weakref.WeakKeyDictionary()


def _keys_by_query(groups: Groups) -> dict[int, list[list[int]]]:
    """The key lists of every query id, remembered for as long as the layout lives."""
    if groups not in _owners:
        found: dict[int, list[list[int]]] = {}
        for g in range(groups.cu_q.numel() - 1):
            keys = groups.k_index[groups.cu_k[g] : groups.cu_k[g + 1]].tolist()
            for query in groups.q_index[groups.cu_q[g] : groups.cu_q[g + 1]].tolist():
                found.setdefault(query, []).append(keys)
        _owners[groups] = found
    return _owners[groups]


def _sets(groups: Groups, b: int, h: int, i: int, shape: tuple[int, int, int, int]) -> list[list[int]]:
    heads, kv_heads, q_len, kv_len = shape
    mine = (b * heads + h) * q_len + i if groups.per_head else b * q_len + i
    head = h // (heads // kv_heads)
    begin = ((b * kv_heads + head) if groups.per_head else b) * kv_len
    found = _keys_by_query(groups).get(mine, [])
    return [[j - begin for j in keys if begin <= j < begin + kv_len] for keys in found]


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout | None,
    host: Host,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in float64, one query after the other, in NumPy.

    Returns:
        ``out`` ``(B, H, Nq, Dv)``, ``lse`` ``(B, H, Nq)``, and how often each pair is visible ``(B, H, Nq, Nk)``.
    """
    qs, ks, vs = (t.detach().double().numpy() for t in (q, k, v))
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    batch, heads, q_len, _ = qs.shape
    kv_heads, kv_len = ks.shape[1:3]
    out, lse = np.zeros((batch, heads, q_len, vs.shape[3])), np.full((batch, heads, q_len), -np.inf)
    seen = np.zeros((batch, heads, q_len, kv_len), dtype=np.int16)
    allowed = host.dense()
    mean = isinstance(layout, Groups) and layout.combine == "mean"
    for b in range(batch):
        for h in range(heads):
            own = h * kv_heads // heads
            for i in range(q_len):
                parts = []
                for listing in listed(layout, b, h, i, (heads, kv_heads, q_len, kv_len)):
                    keys = np.array(listing, dtype=np.int64)
                    keys = keys[allowed[b, i, keys]]
                    np.add.at(seen[b, h, i], keys, 1)
                    s = ks[b, own, keys] @ qs[b, h, i] * scale
                    if softcap is not None:
                        s = np.tanh(s / softcap) * softcap
                    if bias is not None:
                        reach = bias.shape[1] // 2
                        s = s + bias.detach().double().numpy()[h, (keys - i - host.first).clip(-reach, reach) + reach]
                    parts.append((s, vs[b, own, keys]))
                if parts:
                    s, values = (np.concatenate(some) for some in zip(*parts, strict=True))
                    out[b, h, i], lse[b, h, i] = _softmax(s, values)
                    if mean:
                        out[b, h, i] = np.mean([_softmax(*part)[0] for part in parts], 0)
                if sink_logits is not None:
                    both = np.logaddexp(lse[b, h, i], float(sink_logits[h]))
                    out[b, h, i] *= np.exp(lse[b, h, i] - both)
                    lse[b, h, i] = both
    return torch.from_numpy(out), torch.from_numpy(lse), torch.from_numpy(seen)


def _softmax(s: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, float]:
    if s.size == 0:
        return np.zeros(values.shape[1]), -np.inf
    e = np.exp(s - s.max())
    return e / e.sum() @ values, float(np.log(e.sum()) + s.max())


def assert_close(got: Tensor, expected: Tensor, atol: float = 1e-10, what: str = "") -> None:
    """Equal within ``atol`` times the larger of 1 and the expected size; infinities must match, NaN never does."""
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    assert not got.isnan().any(), f"{what}: NaN"
    error = (got.double() - expected.double()).abs()
    near = error <= atol * expected.double().abs().clamp(min=1)
    same = (got == expected) | (near & expected.isfinite())
    worst = error.nan_to_num(0).max() if got.numel() else 0.0
    assert bool(same.all()), (
        f"{what}: {int((~same).sum())} of {same.numel()} values differ, by up to {float(worst):.3g}"
    )


def allocated_peak(work: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator held at once for ``work`` (not resident memory: the same on every machine)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        work()
    now = peak = 0
    changes = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
