"""Softmax of rows of logits in place, in one pass of the nearest cache: what the lens makes its blocks of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.errors import ShapeError


class RowFacts(NamedTuple):
    """Of every row, ``(H, R)``: ``top`` its largest logit; ``total`` the sum of ``exp(logit − top)``, with the sink's; ``on_keys``
    the columns' share of that; ``spread`` the sum of weight times ``logit − top``. A row that sees nothing has 1, 1 and 0."""

    top: Tensor
    total: Tensor
    on_keys: Tensor
    spread: Tensor


def softmax_rows_(
    x: Tensor, lo: Tensor, hi: Tensor, sink: Tensor | None = None, hidden: float = -torch.inf
) -> RowFacts:
    """Turn logits into weights in place.

    Args:
        x: ``(H, R, K)`` float32 logits, contiguous, on CPU.
        lo, hi: ``(R,)`` int64; row ``i`` sees the columns ``lo[i] ≤ j < hi[i]``, the others become 0.
        sink: ``(H,)`` logits of a key that has no column. hidden: a row whose largest logit is not above this sees nothing.

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
    facts = torch.empty(4, heads, rows)
    lo, hi = lo.contiguous(), hi.contiguous()
    if sink is not None:
        sink = sink.detach().to(torch.float32).contiguous()
        if sink.shape != (heads,):
            raise ShapeError(f"sink has shape {tuple(sink.shape)}; expected ({heads},).")
    if x.numel():
        _native.softmax_rows(
            x.data_ptr(), heads, rows, width, lo.data_ptr(), hi.data_ptr(), 0 if sink is None else sink.data_ptr(), hidden,
            facts.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
    return RowFacts(*facts)
