"""Layouts that follow from lengths alone, built from intervals: each row keeps a window and the first tokens.

Shared by the static patterns (``sliding_window``, ``triangle``): rows are intervals again, so tile kinds come from O(N)
numbers, as for the model's own mask, and no position is evaluated until a cut tile is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.base_mask import FULL, PARTIAL, BaseMask, Predicate
from ..core.layouts import BlockMask, KeySelection, Layout, block_mask

BLOCK = 128


def window_layout(base: BaseMask, window: int, sinks: int, dense_rows: int = 0, block: int = BLOCK) -> Layout:
    """Keep the last ``window`` keys of every row (the row's own key counts) and the first ``sinks`` keys of its sequence.

    Args:
        base: lengths, offset and ranks; when it is not causal the window opens to both sides.
        window, sinks: counts of tokens.
        dense_rows: this many last rows of the call keep everything.
        block: tile size of the ``BlockMask``.

    Returns:
        A ``BlockMask``, or for a single query a ``KeySelection`` of at most ``window + sinks`` keys.
    """
    memo = ("window_layout", window, sinks, dense_rows, block)
    if memo not in base.cache:
        one = base.q_len == 1 and base.causal and not dense_rows
        base.cache[memo] = _one_row(base, window, sinks) if one else _tiles(base, window, sinks, dense_rows, block)
    return base.cache[memo]


def _one_row(base: BaseMask, window: int, sinks: int) -> KeySelection:
    own = base.shift
    near = torch.arange(max(0, own - window + 1), own + 1, device=base.device)
    first = base.rank[:, : int(near[0])]
    hit = (first >= 0) & (first < sinks)
    width = int(hit.sum(-1).max()) if hit.numel() else 0
    early = torch.topk(hit.to(torch.int8), width, dim=-1).indices.sort(-1).values  # (B or 1, width)
    early = torch.where(hit.gather(1, early), early, -1)
    index = torch.cat([early, near[None].expand(early.shape[0], -1)], -1)
    return KeySelection(index[:, None, None, :], 1)


def _tiles(base: BaseMask, window: int, sinks: int, dense_rows: int, block: int) -> BlockMask:
    own = torch.arange(base.q_len, device=base.device) + base.shift
    everything = torch.arange(base.q_len, device=base.device) >= base.q_len - dense_rows
    lo = torch.where(everything, 0, (own - window + 1).clamp(min=0))[None]
    ahead = base.kv_len if base.causal else window
    hi = torch.where(everything, base.kv_len, (own + ahead).clamp(max=base.kv_len))[None]
    near = BaseMask(base.q_len, base.kv_len, lo, torch.maximum(hi, lo), base.shift, base.causal, base.rank)
    kinds = near.block_map(block, block)
    sink = (base.rank >= 0) & (base.rank < sinks)
    pad = kinds.shape[-1] * block - base.kv_len
    tiles = torch.nn.functional.pad(sink, (0, pad)).view(sink.shape[0], 1, -1, block)
    real = torch.nn.functional.pad(torch.ones_like(sink), (0, pad)).view(sink.shape[0], 1, -1, block)
    early = tiles.any(-1).to(torch.int8) * PARTIAL
    early[(tiles | ~real).all(-1) & tiles.any(-1)] = FULL
    return block_mask(
        torch.maximum(kinds, early)[:, None], (block, block), (base.q_len, base.kv_len), _mask_mod(near, sink)
    )


def _mask_mod(near: BaseMask, sink: Tensor) -> Predicate:
    lo, hi = near.lo[0], near.hi[0]
    step = int(sink.shape[0] > 1)

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= lo[q]) & (k < hi[q])) | sink[b * step, k]

    return kept
