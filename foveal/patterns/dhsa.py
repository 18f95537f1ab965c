"""DHSA, Dynamic Hierarchical Sparse Attention (arXiv 2510.24606): the chunk form (v1) and the block variants (v2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..core.budget import Budget
from ..core.context import SelectContext, State
from ..core.errors import ConfigError, UnsupportedError
from ..core.layouts import KeySelection, Layout
from ..core.registry import register
from ..core.serial import check_range, check_types
from ..core.weights import file_sha256
from ..kernels.call import compute_dtype
from ..kernels.pooling import filled_keys, full_precision
from .base import LookAhead, Pattern
from .boundaries import find_file, load_predictor
from .dhsa_blocks import BlockRule
from .dhsa_chunks import Pooling, select_chunks, spans
from .dhsa_state import ChunkRule, without_sharing
from .documents import crop, documents, tile_layout

DEFAULT_BUDGET = Budget(density=0.125)


@register("pattern", "dhsa")
@dataclass(frozen=True)
class DHSA(Pattern):
    """Sparse prefill for a frozen causal model: score chunks or blocks of keys, keep the best for each query block.

    Attributes:
        budget: ``tokens`` is N_b keys per query block (block variants: ``K = max(1, tokens // kv_block)`` blocks);
            ``density`` is the share of the keys that a query block may see (block variants: the K, equal for all query
            blocks, that comes nearest to this share of all allowed pairs). The paper's density δ is a share of *all* N keys:
            write ``tokens = δ·N`` for it. ``mass`` is refused.
        variant: ``"chunk"`` (v1: chunks, token lists) or ``"vsb"``, ``"vs"``, ``"a"``, ``"topk"`` (v2: tiles per head,
            no training; see ``dhsa_blocks``).
        q_block: query rows that share one choice.
        kv_block: keys per block in the block variants.
        local: chunk form: last tokens of each query block that stay, at least the block's own, so every row sees itself.
        sinks: chunk form: first tokens (of the window, where the model has one) that stay.
        instruction: chunk form: last rows of a prompt that attend densely, with the rows that share their query block.
        per_head: chunk form: choose for each query head instead of once from head-averaged queries and keys.
        pooling: chunk form: ``"avgpool_norm"`` (√n · mean), ``"avgpool"`` or ``"maxpool"``.
        predictor: chunk form: safetensors file of a boundary predictor; empty for chunks of fixed length.
        predictor_sha256: SHA-256 of that file; another file under this name is refused.
        predictor_heads: attention heads of the predictor, 0 for those it was trained with (the authors train with 4 and
            infer with 8).
        chunk: tokens of a fixed chunk.
        max_chunk: length at which an open chunk closes in decoding with a predictor.
        threshold: a boundary needs a logit above this; 1.1 is a probability of 0.75.
        gap: boundaries nearer than this to a better one are dropped.
        decode: ``"dense"`` as in both code versions, or ``"reconstructed"`` (chunk form): running chunk sums, a boundary
            known ``window`` tokens late. Described but never released by the authors, hence a reconstruction.
        literal: block variants as the authors released them, errors included (see ``dhsa_blocks``): rows may not see
            themselves, ``topk`` reads the future and may leave rows with no key, which give zeros.

    The literal chunk form is refused: its lists hold early keys twice, and a layout has unique positions.
    Which rows are last, K under a density, the vertical and slash scores, whole chunks and the choice among predicted
    boundaries are known only at the end of a prompt: ``look_ahead`` is ``"prefill"``, and a prompt fed in pieces gives other,
    equally valid choices. Only ``a`` and ``topk`` under a token budget read no further than their query block. State: ``Chunks`` for the chunk form.
    """

    budget: Budget = DEFAULT_BUDGET
    variant: Literal["chunk", "a", "vs", "vsb", "topk"] = "vsb"
    q_block: int = 128
    kv_block: int = 32
    local: int = 128
    sinks: int = 128
    instruction: int = 64
    per_head: bool = False
    pooling: Pooling = "avgpool_norm"
    predictor: str = ""
    predictor_sha256: str = ""
    predictor_heads: int = 0
    chunk: int = 64
    max_chunk: int = 256
    threshold: float = 1.1
    gap: int = 8
    decode: Literal["dense", "reconstructed"] = "dense"
    literal: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name, low in (
            ("q_block", 1),
            ("kv_block", 1),
            ("local", 0),
            ("sinks", 0),
            ("instruction", 0),
            ("predictor_heads", 0),
        ):
            check_range(self, name, low=low)
        for name, low in (("chunk", 1), ("max_chunk", 1), ("gap", 0)):
            check_range(self, name, low=low)
        chunk = self.variant == "chunk"
        if self.budget.mass is not None:
            raise ConfigError(
                f"DHSA.budget is {self.budget}; expected tokens or density. For a mass budget use block_topk."
            )
        if self.literal and chunk:
            raise ConfigError(
                "DHSA.literal is true with variant 'chunk'; expected a block variant. The authors' lists hold keys twice, which no layout "
                "with unique positions can express; drop literal (predictor_heads=8 gives their inference setting)."
            )
        if self.decode == "reconstructed" and not chunk:
            raise ConfigError(
                f"DHSA.decode is 'reconstructed' with variant {self.variant!r}; expected 'dense', or variant 'chunk'."
            )
        if self.predictor and not chunk:
            raise ConfigError(
                f"DHSA.predictor is {self.predictor!r} with variant {self.variant!r}; only variant 'chunk' has boundaries."
            )
        if bool(self.predictor) != bool(self.predictor_sha256):
            raise ConfigError(
                "DHSA.predictor and predictor_sha256 come together; DHSA.with_predictor(path) fills in both."
            )

    @classmethod
    def with_predictor(cls, path: str | Path, **fields: Any) -> Self:
        """The chunk form with the boundary predictor in this file, its digest computed now."""
        return cls(variant="chunk", predictor=str(path), predictor_sha256=file_sha256(find_file(str(path))), **fields)

    @property
    def look_ahead(self) -> LookAhead:
        if self.variant == "chunk":
            return "prefill"  # a chunk's vector covers the whole chunk, also its keys after the query block
        near: LookAhead = "block" if self.q_block > 1 else "none"
        by_length = self.budget.tokens is None  # K then follows from the prompt's length
        return (
            "prefill"
            if by_length or self.variant in ("vs", "vsb") or (self.variant == "topk" and self.literal)
            else near
        )

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State = None) -> tuple[Layout | None, State]:
        """A ``BlockMask`` (block variants) or ``KeySelection`` (chunk form); dense for one new token unless reconstructed."""
        with full_precision(q):
            return self._select(q, k, ctx, state)

    def _select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State) -> tuple[Layout | None, State]:
        base = ctx.base
        if self.budget.density == 1.0 and not self.literal:
            return None, state
        if base.q_len <= 1 and (self.decode == "dense" or base.kv_len <= 1):
            return None, state
        if self.variant != "chunk":
            scale = 1.0 / math.sqrt(q.shape[-1]) if ctx.scale is None else ctx.scale
            rule = BlockRule(self.variant, self.budget, self.q_block, self.kv_block, scale, self.literal)
            return tile_layout(q, k, base, (self.q_block, self.kv_block), rule.keep), state
        if not base.causal:
            raise UnsupportedError(
                "dhsa with variant 'chunk' ranks earlier keys and this attention is bidirectional; use variant='a' or block_topk."
            )
        if self.budget.tokens is not None and self.budget.tokens >= filled_keys(base):
            return None, None
        if documents(base):
            return self._packed(q, k, ctx), None
        return self._chunks(q, k, ctx, state)

    def _chunks(self, q: Tensor, k: Tensor, ctx: SelectContext, state: State) -> tuple[KeySelection, State]:
        base = ctx.base
        chunks = self._rule(k).follow(k, ctx, state)
        block, question = (1, 0) if base.q_len == 1 else (self.q_block, self.instruction)
        share = self.budget.tokens is None
        keys = self.budget.density if self.budget.tokens is None else self.budget.tokens
        assert keys is not None
        span = spans(base, block, self.local, self.sinks, question, keys, share)
        return select_chunks(q, chunks, base, block, self.pooling, span), chunks

    def _packed(self, q: Tensor, k: Tensor, ctx: SelectContext) -> KeySelection:
        """Each document by itself; a query block that holds several gets their lists joined."""
        base, size = ctx.base, self.q_block
        parts = []
        for document in documents(base):
            start, stop = document.first // size * size, min(-(-document.stop // size) * size, base.kv_len)
            part = slice(start, stop)
            inside = without_sharing(ctx, crop(base, document, start, stop))
            lists, _ = self._chunks(q[document.rows, :, part], k[document.rows, :, part], inside, None)
            parts.append((document.rows, start // size, torch.where(lists.index >= 0, lists.index + start, -1)))
        blocks, heads = -(-base.q_len // size), parts[0][2].shape[1]
        count = torch.zeros(q.shape[0], heads, blocks, dtype=torch.long, device=q.device)
        for rows, u, index in parts:
            count[rows, :, u : u + index.shape[2]] += (index >= 0).sum(-1)
        out = torch.full((*count.shape, int(count.max()) + 1), -1, device=q.device)  # the last column takes the padding
        count.zero_()
        for rows, u, index in parts:
            here = count[rows, :, u : u + index.shape[2]]
            real = index >= 0
            place = torch.where(real, here[..., None] + real.long().cumsum(-1) - 1, out.shape[-1] - 1)
            out[rows, :, u : u + index.shape[2]] = out[rows, :, u : u + index.shape[2]].scatter(
                -1, place, torch.where(real, index, -1)
            )
            here += real.sum(-1)
        return KeySelection(out[..., :-1], size)

    def _rule(self, k: Tensor) -> ChunkRule:
        predictor = None
        if self.predictor:
            predictor = load_predictor(self.predictor, self.predictor_sha256, k.device, compute_dtype(k.dtype))
            if self.predictor_heads:
                predictor = replace(predictor, heads=self.predictor_heads)
        name = (
            (self.predictor_sha256, self.predictor_heads, self.threshold, self.gap) if self.predictor else (self.chunk,)
        )
        return ChunkRule(
            predictor, self.chunk, self.max_chunk, self.threshold, self.gap, 8, self.q_block, self.instruction,
            self.per_head, self.pooling, ("dhsa", *name, self.q_block, self.instruction),
        )  # fmt: skip
