"""SparseD's arithmetic: which key blocks belong to the answer, mean attention per block, and the best blocks of each side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import EMPTY, BaseMask
from ..kernels.call import compute_dtype
from ..kernels.pooling import block_counts, diagonal_tiles, real_rows

_SCORES = 1 << 24
"""Scores held at once, at most, when one block of rows of one head fits in."""


@dataclass(frozen=True, eq=False)
class Sides:
    """Key blocks of the prompt and of the answer.

    Attributes:
        block: keys per block.
        answer: ``(B or 1, key blocks)`` bool, blocks that lie wholly in the last tokens of their sequence.
        sizes: ``(B or 1, key blocks)`` int64, real keys per block.
    """

    block: int
    answer: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, base: BaseMask, block: int, generated: int) -> Sides:
        """Sides for the last ``generated`` real tokens of every sequence."""
        end = min(base.kv_len, base.shift + base.q_len) if base.causal else base.kv_len
        at = torch.arange(base.kv_len, device=base.device)
        real = (at < end)[None] if base.valid is None else base.valid & (at < end)
        stop = torch.where(real, at + 1, 0).amax(-1)
        begin = torch.arange(-(-base.kv_len // block), device=base.device) * block
        sizes = block_counts(real, block)
        answer = (begin >= stop[:, None] - generated) & (sizes > 0)
        return cls(block, answer, sizes)


def side_importance(
    q: Tensor, k: Tensor, base: BaseMask, scale: float, sides: Sides, *, apart: bool, padded: bool
) -> tuple[Tensor, Tensor]:
    """Mean attention of query block and key block, as the prompt's side and as the answer's side rank it.

    Args:
        q: ``(B, H, Nq, D)``; k: ``(B, Hkv, Nk, D)``. scale: factor of q·k.
        apart: the prompt's softmax runs over the prompt's keys alone; otherwise over all keys.
        padded: means of a partial block divide by the whole block's size.

    Returns:
        Two tensors ``(B, H, q blocks, key blocks)``; the answer's softmax always runs over the answer's keys alone.
    """
    batch, heads, q_len = q.shape[:3]
    group, block, nkb = heads // k.shape[1], sides.block, sides.answer.shape[1]
    nqb = -(-q_len // block)
    kind = compute_dtype(q.dtype)
    answer = sides.answer[:, None, None]  # (B or 1, 1, 1, key blocks)
    tail = nkb * block - base.kv_len
    cut = base.causal or not base.plain
    size = torch.full_like(sides.sizes, block) if padded else sides.sizes.clamp(min=1)
    real = real_rows(base)
    out = q.new_zeros(2, batch, heads, nqb, nkb, dtype=kind)
    per_head = batch * min(block, q_len) * base.kv_len
    some = max(1, min(group, _SCORES // max(per_head, 1)))
    b = torch.arange(batch, device=q.device)[:, None, None, None]
    keys = torch.arange(base.kv_len, device=q.device)
    for u in range(nqb):
        rows = torch.arange(u * block, min((u + 1) * block, q_len), device=q.device)
        for kv_head in range(k.shape[1]):
            k_t = k[:, kv_head, None].to(kind).transpose(-1, -2)
            for first in range(kv_head * group, (kv_head + 1) * group, some):
                own = slice(first, min(first + some, (kv_head + 1) * group))
                h = torch.arange(own.start, own.stop, device=q.device)[:, None, None]
                logits = (q[:, own, rows[0] : rows[-1] + 1].to(kind) @ k_t) * scale
                if cut:
                    logits = logits.masked_fill(~base.allowed(b, h, rows[:, None], keys), -torch.inf)
                logits = pad(logits, (0, tail), value=-torch.inf) if tail else logits
                weight = real[:, None, rows, None].to(kind)
                per_block = torch.logsumexp(logits.unflatten(-1, (nkb, block)), -1)  # the only pass over single keys
                for side, hidden in enumerate((answer if apart else None, ~answer)):
                    seen = per_block if hidden is None else per_block.masked_fill(hidden, -torch.inf)
                    share = (
                        torch.softmax(seen, -1).nan_to_num(0.0) * weight
                    )  # a row without a key of this side counts 0
                    out[side, :, own, u] = share.sum(2) / (weight.sum(2).clamp(min=1) * size[:, None])
    return out[0], out[1]


def keep_count(share: float, blocks: Tensor) -> Tensor:
    """``min(n, ⌊share·n⌋ + 1)`` for every n of an int64 tensor; 0 of 0."""
    return torch.minimum(torch.floor(share * blocks.double() + 1e-9).long() + 1, blocks)


def choose(
    prompt: Tensor, answer: Tensor, base: BaseMask, sides: Sides, share: float, selection: Literal["paper", "code"]
) -> Tensor:
    """``(B, H, q blocks, key blocks)`` bool: the best blocks of each side, chosen apart."""
    block = sides.block
    reach = (base.block_map(block, block) > EMPTY)[:, None]
    on_answer = sides.answer[:, None, None]
    ranked = reach & ~on_answer if selection == "paper" else reach
    kept = _best(prompt, ranked, share) & ~on_answer
    kept = kept | _best(answer, reach & on_answer, share)
    if base.causal:
        kept = kept | (reach & diagonal_tiles(base, block, block))
    return kept


def _best(score: Tensor, candidate: Tensor, share: float) -> Tensor:
    """The ``keep_count`` best candidates of every row; equal scores go to the lower block."""
    candidate = candidate.expand(score.shape)
    order = torch.where(candidate, score, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    count = keep_count(share, candidate.sum(-1, keepdim=True))
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.zeros_like(candidate).scatter(-1, order, place < count)
