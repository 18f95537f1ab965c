"""Logits of rows and their softmax, a few rows at a time in the nearest cache: what the lens makes its blocks of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import ShapeError

PANEL = 64
PART, PART_ROWS = 3 << 15, 48
"""Logits, and rows of a head at most, that one thread takes at a time: they stay in the second-level cache. Rows in twelves, which
is a multiple of the rows of every register tile but the last."""


class RowFacts(NamedTuple):
    """Of every row, ``(H, R)``: ``top`` its largest logit; ``total`` the sum of ``exp(logit − top)``, with the sink's; ``on_keys``
    the columns' share of that; ``spread`` the sum of weight times ``logit − top``; ``away`` that of weight times
    ``|column − own column|``. A row that sees nothing has 1, 1, 0 and 0. And ``sums (H, K)`` of the weights over the rows."""

    top: Tensor
    total: Tensor
    on_keys: Tensor
    spread: Tensor
    away: Tensor
    sums: Tensor


def pack_keys(keys: Tensor) -> Tensor:
    """Keys ``(K, D)`` as ``(⌈K/64⌉, D, 64)`` float32, the form in which :func:`softmax_rows_` takes them."""
    from . import _native

    keys = keys.to(torch.float32).contiguous()
    count, dim = keys.shape
    out = torch.empty(-(-count // PANEL), dim, PANEL)
    if out.numel():
        _native.pack_keys(keys.data_ptr(), count, dim, out.data_ptr(), torch.get_num_threads())
    return out


class Products(NamedTuple):
    """What logits are made of: ``q (H, R, D)``, scaled; ``keys`` of :func:`pack_keys`, and which of them is the first column's."""

    q: Tensor
    keys: Tensor
    first: int


def softmax_rows_(
    x: Tensor, lo: Tensor, hi: Tensor, sink: Tensor | None = None, hidden: float = -torch.inf, own: int = 0, products: Products | None = None
) -> RowFacts:  # fmt: skip
    """Turn logits into weights in place.

    Args:
        x: ``(H, R, K)`` float32 logits, contiguous, on CPU.
        lo, hi: ``(R,)`` int64; row ``i`` sees the columns ``lo[i] ≤ j < hi[i]``, the others become 0.
        sink: ``(H,)`` logits of a key that has no column. hidden: a row whose largest logit is not above this sees nothing.
        products: the logits are made first; what ``x`` holds before does not matter.
        own: column of row 0's own key, which may lie outside the block; row ``i``'s is ``own + i``.

    Raises:
        ShapeError: other types, shapes or memory orders.
    """
    from . import _native

    heads, rows, width = x.shape
    if x.dtype != torch.float32 or not x.is_contiguous() or x.device.type != "cpu":
        raise ShapeError(f"x is {x.dtype} of strides {x.stride()} on {x.device}; expected contiguous float32 on CPU.")
    for name, bound in (("lo", lo), ("hi", hi)):
        if bound.shape != (rows,) or bound.dtype != torch.int64:
            raise ShapeError(
                f"{name} is {bound.dtype} of shape {tuple(bound.shape)}; expected int64 of shape ({rows},)."
            )
    q, keys, dim, first = 0, 0, 0, 0
    if products is not None:
        dim, first = products.q.shape[-1], products.first
        scaled, packed = products.q.to(torch.float32).contiguous(), products.keys
        fits = packed.dtype == torch.float32 and packed.is_contiguous() and packed.shape[1:] == (dim, PANEL)
        if scaled.shape != (heads, rows, dim) or not fits or not 0 <= first <= packed.shape[0] * PANEL - width:
            raise ShapeError(
                f"products has q of shape {tuple(scaled.shape)}, keys of shape {tuple(packed.shape)} from {first} on; expected "
                f"({heads}, {rows}, D) and the result of pack_keys for (at least {first + width}, D)."
            )
        q, keys = scaled.data_ptr(), packed.data_ptr()
    each = min(max(PART // max(width, 1), 1), PART_ROWS)
    each -= each % 12 if each > 12 else 0
    facts, sums = torch.empty(5, heads, rows), torch.zeros(heads, -(-rows // each), width)
    lo, hi = lo.contiguous(), hi.contiguous()
    if sink is not None:
        sink = sink.detach().to(torch.float32).contiguous()
        if sink.shape != (heads,):
            raise ShapeError(f"sink has shape {tuple(sink.shape)}; expected ({heads},).")
    if x.numel():
        _native.softmax_rows(
            x.data_ptr(), q, keys, dim, first, heads, rows, width, lo.data_ptr(), hi.data_ptr(), 0 if sink is None else sink.data_ptr(), hidden,
            own, facts.data_ptr(), each, sums.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    top, total, on_keys, spread, away = facts
    return RowFacts(top, total, on_keys, spread, away, sums.sum(1))
