"""What a pattern keeps, as a picture of few cells: for the terminal and for figures, at any length."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.base_mask import FULL, BaseMask
from ..core.context import SelectContext
from ..core.density import Density, measure, visible
from ..core.layouts import BlockMask, Groups, KeySelection, Layout, block_mask_kinds, narrow
from .base import Pattern

SEGMENT = (12, 90)
"""Shortest and longest segment of the example's keys."""
TOPICS = 12


@dataclass(frozen=True, eq=False)
class Picture:
    """A pattern drawn.

    Attributes:
        shares: ``(H, rows, columns)`` float64; the share of a cell's pairs that is kept.
        query: ``(H, Nk)`` bool, the keys that the chosen query keeps; None when none was chosen.
        density: counted over all pairs and heads.
    """

    shares: Tensor
    query: Tensor | None
    density: Density


def draw(
    pattern: Pattern,
    tokens: int,
    *,
    rows: int,
    columns: int,
    causal: bool = True,
    heads: int = 1,
    grid: tuple[int, ...] | None = None,
    query: int | None = None,
    seed: int = 0,
) -> Picture:
    """Select on example tensors and count what is kept in every cell; memory O(tokens), time O(tokens²).

    Args:
        pattern: any pattern.
        tokens: queries and keys.
        rows, columns: cells; at most one per token.
        causal: the model's own mask, or none.
        heads: query and key heads of the example.
        grid: token grid that the model would tell, such as (height, width).
        query: a row whose keys are wanted.
        seed: of the example tensors: keys are topics that change every few dozen tokens, and each query asks for its own
            topic and for another one, so that patterns that read content have something to find.
    """
    base = BaseMask.build(tokens, tokens, causal=causal)
    q, k = example_tensors(tokens, heads, seed)
    ctx = SelectContext(base=base, grid=grid)
    with torch.no_grad():
        layout, _ = pattern.select(q, k, ctx, None)
    rows, columns = min(rows, tokens), min(columns, tokens)
    counts = torch.zeros(heads, rows, columns, dtype=torch.float64)
    row_of, column_of = (torch.arange(tokens) * n // tokens for n in (rows, columns))
    into = torch.nn.functional.one_hot(column_of, columns).double()
    chosen = None if query is None else torch.zeros(heads, tokens, dtype=torch.bool)
    for h, at, kept in _kept(layout, base, heads):
        counts[h].index_add_(0, row_of[at], kept.double() @ into)
        if chosen is not None and query is not None and query in at:
            chosen[h] |= kept[at == query].any(0)
    sizes = torch.bincount(row_of, minlength=rows)[:, None] * torch.bincount(column_of, minlength=columns)
    return Picture((counts / sizes).clamp(max=1.0), chosen, measure(layout, base, 1, heads, heads))


def example_tensors(tokens: int, heads: int, seed: int, dim: int = 32) -> tuple[Tensor, Tensor]:
    """q and k ``(1, heads, tokens, dim)`` with content to find (see :func:`draw`)."""
    g = torch.Generator().manual_seed(seed)
    low, high = SEGMENT
    starts = torch.randint(low, high + 1, (tokens // low + 1,), generator=g).cumsum(0)
    segment = torch.searchsorted(starts, torch.arange(tokens), right=True)
    topic = torch.randint(TOPICS, (int(segment.max()) + 1,), generator=g)
    q, k = [], []
    for _ in range(heads):
        centres = 2 * torch.randn(TOPICS, dim, generator=g)
        other = torch.randint(TOPICS, (len(topic),), generator=g)
        k.append(centres[topic[segment]] + torch.randn(tokens, dim, generator=g))
        q.append(centres[topic[segment]] + 1.5 * centres[other[segment]] + torch.randn(tokens, dim, generator=g))
    return torch.stack(q)[None], torch.stack(k)[None]


def _kept(layout: Layout | None, base: BaseMask, heads: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``(head, rows (R,), kept (R, Nk))``, a part of the rows at a time; a pair in several groups comes once per group."""
    keys = torch.arange(base.kv_len)
    zero = torch.zeros(1, 1, dtype=torch.long)
    if isinstance(layout, Groups):
        yield from _kept_groups(layout, base, heads)
        return
    if isinstance(layout, KeySelection):
        for block in range(layout.index.shape[2]):
            ok = visible(layout, base, block, 1)[0]
            rows = block * layout.block_size + torch.arange(ok.shape[1])
            for h in range(heads):
                own = h * ok.shape[0] // heads
                index = layout.index[0, own, block]
                kept = torch.zeros(len(rows), base.kv_len + 1, dtype=torch.bool)
                kept[:, torch.where(index >= 0, index, base.kv_len)] = ok[own]
                yield h, rows, kept[:, :-1]
        return
    joint = narrow(layout, base, transpose=False) if isinstance(layout, BlockMask) else narrow(None, base)
    kinds = block_mask_kinds(joint)[0]
    q_block, kv_block = joint.BLOCK_SIZE
    for u in range(kinds.shape[1]):
        rows = torch.arange(u * q_block, min((u + 1) * q_block, base.q_len))
        for h in range(heads):
            kind = kinds[h * kinds.shape[0] // heads, u][keys // kv_block]
            inside = joint.mask_mod(zero, zero + h, rows[:, None], keys[None]).expand(len(rows), -1)
            yield h, rows, ((kind == FULL) | (kind > 0) & inside)


def _kept_groups(layout: Groups, base: BaseMask, heads: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    zero = torch.zeros(1, 1, dtype=torch.long)
    for g in range(layout.cu_q.numel() - 1):
        q = layout.q_index[layout.cu_q[g] : layout.cu_q[g + 1]]
        k = layout.k_index[layout.cu_k[g] : layout.cu_k[g + 1]] % base.kv_len
        for h in range(heads):
            rows = q[q // base.q_len == h] % base.q_len if layout.per_head else q
            for part in rows.split(1024):
                kept = torch.zeros(len(part), base.kv_len, dtype=torch.bool)
                kept[:, k] = base.allowed(zero, zero, part[:, None], k[None])
                yield h, part, kept


def cells(tokens: int, most: int) -> int:
    """Cells along an axis: one per token while they fit, else as many whole blocks as fit in ``most``."""
    return tokens if tokens <= most else math.ceil(tokens / math.ceil(tokens / most))
