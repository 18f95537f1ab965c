"""Where DHSA's chunks begin and how they follow the cache: from the predictor, at fixed lengths, and step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.base_mask import BaseMask
from ..core.context import SelectContext
from ..kernels.pooling import check_same_keys, filled_keys, keys_before
from .boundaries import Predictor, boundary_logits, key_features, pick_boundaries
from .dhsa_chunks import NONE, Chunks, Pooling, head_mean, pool_chunks


@dataclass(frozen=True)
class ChunkRule:
    """How chunks are formed and pooled.

    Attributes:
        predictor: None gives chunks of ``length`` tokens.
        length: tokens of a fixed chunk.
        longest: while decoding with a predictor, an open chunk closes at this length.
        threshold, gap: see ``pick_boundaries``.
        per_block: at most this many boundaries per ``q_block`` tokens of a prompt.
        q_block: rows per query block.
        instruction: last rows of a prompt; they form one chunk when a predictor is used.
        per_head: pool each KV head by itself.
        pooling: see ``chunk_vectors``.
        name: identity of the predictor and its settings.
    """

    predictor: Predictor | None
    length: int
    longest: int
    threshold: float
    gap: int
    per_block: int
    q_block: int
    instruction: int
    per_head: bool
    pooling: Pooling
    name: tuple[object, ...]

    def follow(self, k: Tensor, ctx: SelectContext, state: object) -> Chunks:
        """The chunks of all keys so far: from ``state`` and the one new key where possible, else from ``k``.

        Raises:
            ShapeError: the state is of another model's keys.
        """
        base = ctx.base
        if isinstance(state, Chunks) and state.rule == self.name:
            check_same_keys("dhsa", state.pooled.shape[1], state.pooled.shape[3], k if self.per_head else k[:, :1])
        filled = filled_keys(base)
        origin = tuple(base.rank[:, 0].tolist())
        leader = self._leader(ctx, filled)
        one_more = (
            base.q_len == 1
            and isinstance(state, Chunks)
            and (state.rule, state.origin, state.absorbed) == (self.name, origin, filled - 1)
            and state.pooled.shape[0] == k.shape[0]
        )
        if one_more:
            assert isinstance(state, Chunks)
            first = self._next(state.first, k, base) if leader is None else leader.first
            pooled = self._grow(state, first, k, base)
            if pooled is not None:
                return Chunks(first, pooled, filled, origin, self.name)
        first = self._all(k, base, prompt=base.q_len > 1) if leader is None else leader.first
        return Chunks(
            first, pool_chunks(head_mean(k, self.per_head), first, base, self.pooling), filled, origin, self.name
        )

    def _leader(self, ctx: SelectContext, filled: int) -> Chunks | None:
        """Boundaries of the first layer that has predicted them in this forward; they are shared by all layers."""
        if self.predictor is None:
            return None
        for layer in sorted(ctx.earlier):
            state = ctx.earlier[layer].state
            if (
                layer < ctx.layer_index
                and isinstance(state, Chunks)
                and (state.rule, state.absorbed) == (self.name, filled)
            ):
                return state
        return None

    def _all(self, k: Tensor, base: BaseMask, prompt: bool) -> Tensor:
        """``(B or 1, C)`` first ranks of the chunks of all keys."""
        before, filled = keys_before(base), filled_keys(base)
        total = before[:, filled]
        if self.predictor is None:
            first = torch.arange(max(1, -(-int(total.max()) // self.length)), device=k.device) * self.length
            return torch.where(first < total[:, None], first, NONE)
        valid = None if base.valid is None else base.valid[:, :filled]
        logits = boundary_logits(
            key_features(k[:, :, :filled], valid), self.predictor.tensors, self.predictor.window, self.predictor.heads
        )
        rows = []
        for b in range(k.shape[0]):
            at = before[b if before.shape[0] > 1 else 0]
            end = int(at[filled])
            question = end - self.instruction if prompt and 0 < self.instruction < end else None
            usable = logits[b].clone()
            usable[at[1 : filled + 1] == at[:filled]] = -torch.inf  # padding
            usable[
                at[1 : filled + 1] >= (end if question is None else question)
            ] = -torch.inf  # no chunk after the question's start
            limit = filled // self.q_block * self.per_block
            ranks = [int(at[i + 1]) for i in pick_boundaries(usable, self.threshold, self.gap, limit)]
            rows.append(sorted({0, *ranks} | ({question} if question is not None else set())))
        width = max(map(len, rows))
        return torch.tensor([row + [NONE] * (width - len(row)) for row in rows], device=k.device)

    def _next(self, first: Tensor, k: Tensor, base: BaseMask) -> Tensor:
        """First ranks after one more key; a predicted boundary is known ``window`` keys late."""
        before, filled = keys_before(base), filled_keys(base)
        used = (first < NONE).sum(-1)
        total = before[:, filled]
        if self.predictor is None:
            begin = torch.where(
                (before[:, filled] > before[:, filled - 1]) & ((total - 1) % self.length == 0) & (total > 1),
                total - 1,
                NONE,
            )
        else:
            w = self.predictor.window
            last = first.gather(1, used.clamp(min=1)[:, None] - 1)[:, 0]
            rows = max(first.shape[0], total.shape[0])
            total, last = total.expand(rows), last.expand(rows)
            begin = torch.where(total - last > self.longest, total - 1, NONE)
            if filled > 2 * w:
                part = slice(filled - 2 * w, filled)
                valid = None if base.valid is None else base.valid[:, part]
                features = key_features(k[:, :, part], valid)
                logit = boundary_logits(features, self.predictor.tensors, w, self.predictor.heads)[:, w - 1]
                at = before[:, filled - w].expand(rows)
                begin = torch.where((logit > self.threshold) & (at - last > self.gap), at, begin)
        rows = max(first.shape[0], begin.shape[0])
        first, begin = first.expand(rows, -1), begin.expand(rows)
        if not bool((begin < NONE).any()):
            return first
        used = used.expand(rows)
        if int(used.max()) == first.shape[1]:
            first = pad(first, (0, 1), value=NONE)
        return first.scatter(
            1,
            used[:, None],
            torch.where(begin < NONE, begin, first.gather(1, used.clamp(max=first.shape[1] - 1)[:, None])[:, 0])[
                :, None
            ],
        )

    def _grow(self, state: Chunks, first: Tensor, k: Tensor, base: BaseMask) -> Tensor | None:
        """Pooled keys after one more key, touching only the chunks that change; None when earlier chunks moved."""
        filled, batch = filled_keys(base), k.shape[0]
        old = state.first.expand(max(state.first.shape[0], first.shape[0]), -1)
        extra = first.shape[1] - old.shape[1]
        if extra < 0:
            return None
        old, new = pad(old, (0, extra), value=NONE), first.expand(old.shape[0], -1)
        added = (new < NONE).sum(-1) - (old < NONE).sum(-1)
        if bool(((old < NONE) & (old != new)).any()) or bool((added < 0).any()) or bool((added > 1).any()):
            return None
        before = keys_before(base)
        real = (before[:, filled] > before[:, filled - 1]).expand(batch)
        key = head_mean(k[:, :, filled - 1 : filled], self.per_head)
        blank = -torch.inf if self.pooling == "maxpool" else 0.0
        pooled = pad(state.pooled, (0, 0, 0, extra), value=blank) if extra else state.pooled.clone()
        open_chunk = ((new < NONE).sum(-1) - 1 - added).clamp(min=0).expand(batch)
        index = open_chunk[:, None, None, None].expand(batch, pooled.shape[1], 1, pooled.shape[3])
        key = torch.where(real[:, None, None, None], key, blank)
        pooled = pooled.scatter_reduce(2, index, key, "amax" if self.pooling == "maxpool" else "sum")
        for b in (added > 0).expand(batch).nonzero()[:, 0].tolist():  # a chunk was split: pool its two parts again
            row = b if new.shape[0] > 1 else 0
            c = int(open_chunk[b])
            at = before[b if before.shape[0] > 1 else 0]
            edges = [int(new[row, c]), int(new[row, c + 1]), int(at[filled])]
            for chunk, (start, stop) in enumerate(pairwise(edges), start=c):
                span = slice(int((at <= start).sum()) - 1, int((at < stop).sum()))
                keys = head_mean(k[b : b + 1, :, span], self.per_head)
                some = (at[span] < at[span.start + 1 : span.stop + 1])[None, None, :, None]
                if self.pooling == "maxpool":
                    pooled[b, :, chunk] = torch.where(some, keys, -torch.inf).amax(2)[0]
                else:
                    pooled[b, :, chunk] = torch.where(some, keys, 0.0).sum(2)[0]
        return pooled


def without_sharing(ctx: SelectContext, base: BaseMask) -> SelectContext:
    """The same surroundings for one document of a packed batch, which shares nothing with other layers."""
    return replace(ctx, base=base, earlier={})
