"""Ulysses: an all-to-all turns a slice of the sequence with all heads into the whole shard with a share of the heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .transport import Line


def _spread_heads(x: Tensor, line: Line) -> Tensor:
    """``(B, H, n, D)`` → ``(B, H/U, U·n, D)``."""
    parts = line.all_to_all(x.unflatten(1, (line.size, -1)).movedim(1, 0))
    return parts.movedim(0, 2).flatten(2, 3)


def _spread_tokens(x: Tensor, line: Line) -> Tensor:
    """``(B, H/U, U·n, D)`` → ``(B, H, n, D)``."""
    parts = line.all_to_all(x.unflatten(2, (line.size, -1)).movedim(2, 0))
    return parts.movedim(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, line: Line, heads: bool) -> Tensor:
        ctx.line, ctx.heads = line, heads
        return (_spread_heads if heads else _spread_tokens)(x, line)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (_spread_tokens if ctx.heads else _spread_heads)(grad, ctx.line), None, None


def to_heads(x: Tensor, line: Line) -> Tensor:
    """Each rank gets its share of the heads of all tokens; fewer heads than ranks are repeated, and their gradients summed."""
    if line.size == 1:
        return x
    if x.shape[1] < line.size:
        x = x.repeat_interleave(line.size // x.shape[1], 1)
    result: Tensor = _Exchange.apply(x, line, True)
    return result


def to_tokens(x: Tensor, line: Line) -> Tensor:
    """The way back."""
    if line.size == 1:
        return x
    result: Tensor = _Exchange.apply(x, line, False)
    return result
