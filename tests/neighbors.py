"""What neighborhood tests compare against: the definition of GNA for one token after the other, in plain Python."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveal.core.grid import Axis


def seen_along(axis: Axis, x: int) -> list[int]:
    """Key coordinates that query ``x`` sees along an axis (GNA, definition; FNA, causal and dilated)."""
    group, i = x % axis.dilation, x // axis.dilation
    length = len(range(group, axis.length, axis.dilation))
    w, s = axis.window, axis.stride
    if axis.causal:
        leader = min((i // s) * s + s - 1, length - 1)
        inside = range(max(leader - w + 1, 0), i + 1)
    else:
        leader = min((i // s) * s + s // 2, length - 1)
        start = min(max(leader - w // 2, 0), length - w)
        inside = range(start, start + w)
    return [group + axis.dilation * j for j in inside]


def mask(axes: tuple[Axis, ...]) -> Tensor:
    """``(N, N)`` bool over row-major tokens: the logical AND of the axes."""
    total = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        one = torch.zeros(axis.length, axis.length, dtype=torch.bool)
        for x in range(axis.length):
            one[x, seen_along(axis, x)] = True
        total = (total[:, None, :, None] & one[None, :, None, :]).flatten(0, 1).flatten(1, 2)
    return total


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of masked dense attention over ``(B, H, N, D)``; key heads are repeated."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    logits = q @ k.transpose(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    logits = logits.masked_fill(~seen, -torch.inf)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


@st.composite
def axes(draw: st.DrawFn, rank: int | None = None, longest: int | None = None, causal: bool = True) -> Any:
    """Legal axes of one, two or three dimensions: odd and even windows, incomplete stride groups, dilation that does not divide."""
    rank = rank or draw(st.integers(1, 3))
    longest = longest or {1: 50, 2: 11, 3: 6}[rank]
    found = []
    for _ in range(rank):
        length = draw(st.integers(1, longest))
        dilation = draw(st.integers(1, min(3, length)))
        window = draw(st.integers(1, length // dilation))
        stride = draw(st.integers(1, window))
        found.append(Axis(length, window, stride, dilation, causal and draw(st.booleans())))
    return tuple(found)
