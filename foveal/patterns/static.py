"""Layouts that follow from lengths alone, built from intervals: each row keeps a window and the first tokens.

Shared by the static patterns (``sliding_window``, ``triangle``): rows are intervals again, so tile kinds come from O(N)
numbers, as for the model's own mask, and no position is evaluated until a cut tile is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.base_mask import FULL, PARTIAL, BaseMask, Predicate
from ..core.errors import ConfigError
from ..core.layouts import BlockMask, KeySelection, Layout, block_mask

BLOCK = 128


def check_block(pattern: object, window: int, block: int) -> None:
    """Raise :class:`ConfigError` unless a window consists of whole blocks."""
    if block < 1 or window % block:
        raise ConfigError(
            f"{type(pattern).__name__}.block is {block!r} with a window of {window}; expected a divisor of the window, or 1 to count tokens."
        )


def window_layout(
    base: BaseMask, window: int, sinks: int, dense_rows: int = 0, block: int = BLOCK, whole: int = 1
) -> Layout:
    """Keep the last ``window`` keys of every row (the row's own key counts) and the first ``sinks`` keys of its sequence.

    Args:
        base: lengths, offset and ranks; when it is not causal the window opens to both sides.
        window, sinks: counts of tokens.
        dense_rows: this many last rows of the call keep everything.
        block: tile size of the ``BlockMask``.
        whole: the window counts whole blocks of this many positions, the row's own block as the last; it is a multiple.

    Returns:
        A ``BlockMask``, or for a single query a ``KeySelection`` of at most ``window + sinks`` keys.
    """
    memo = ("window_layout", window, sinks, dense_rows, block, whole)
    if memo not in base.cache:
        one = base.q_len == 1 and base.causal and not dense_rows
        if one:
            base.cache[memo] = _one_row(base, window, sinks, whole)
        else:
            base.cache[memo] = _tiles(base, window, sinks, dense_rows, block, whole)
    return base.cache[memo]


def _inside(base: BaseMask, own: Tensor, whole: int) -> Tensor:
    """``(B or 1, n)`` how far rows at these key indices are inside their block of ``whole`` positions; 0 for blocks of 1.

    Rows of padding and rows past the keys count on from the last token before them.
    """
    if whole == 1 or base.kv_len == 0:
        return torch.zeros_like(own)[None]
    at = torch.arange(base.kv_len, device=base.device)
    real = base.rank >= 0 if base.valid is None else (base.rank >= 0) & base.valid
    last = torch.where(real, at, -1).cummax(-1).values[:, own.clamp(0, base.kv_len - 1)]
    rank = base.rank.expand(last.shape[0], -1).gather(1, last.clamp(min=0))
    return torch.where(last >= 0, rank + own - last, 0) % whole


def _one_row(base: BaseMask, window: int, sinks: int, whole: int) -> KeySelection:
    keys = torch.arange(base.shift + 1, device=base.device)
    lo = base.shift - (window - whole) - _inside(base, keys[-1:], whole)  # (B or 1, 1)
    near = keys[None, max(0, base.shift - window + 1) :]
    near = torch.where(near < lo, -1, near)
    rank = base.rank[:, : base.shift + 1]
    hit = (rank >= 0) & (rank < sinks) & (keys < lo)
    width = int(hit.sum(-1).max()) if hit.numel() else 0
    early = torch.topk(hit.to(torch.int8), width, dim=-1).indices.sort(-1).values  # (B or 1, width)
    early = torch.where(hit.gather(1, early), early, -1)
    rows = max(early.shape[0], near.shape[0])
    index = torch.cat([early.expand(rows, -1), near.expand(rows, -1)], -1)
    return KeySelection(index[:, None, None, :], 1)


def _tiles(base: BaseMask, window: int, sinks: int, dense_rows: int, block: int, whole: int) -> BlockMask:
    own = torch.arange(base.q_len, device=base.device) + base.shift
    everything = torch.arange(base.q_len, device=base.device) >= base.q_len - dense_rows
    inside = _inside(base, own, whole)
    lo = torch.where(everything, 0, (own[None] - (window - whole) - inside).clamp(min=0))
    ahead = base.kv_len if base.causal else window - inside
    hi = torch.where(everything, base.kv_len, (own[None] + ahead).clamp(max=base.kv_len))
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
    lo, hi = near.lo, near.hi
    line, step = int(lo.shape[0] > 1), int(sink.shape[0] > 1)

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= lo[b * line, q]) & (k < hi[b * line, q])) | sink[b * step, k]

    return kept
