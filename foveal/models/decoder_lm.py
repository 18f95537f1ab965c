"""A small causal language model: RMSNorm, rotary positions, gated MLP, grouped heads, a cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.context import State
from ..core.errors import ShapeError
from ..core.serial import check_sizes
from .blocks import (
    AttentionFactory,
    Block,
    Memory,
    Method,
    Pass,
    check_depth,
    check_ids,
    check_marks,
    chosen,
    factory,
    initialise,
)


class DecoderLM(nn.Module):
    """Causal language model.

    Args:
        vocab_size: tokens. dim, depth, num_heads, num_kv_heads: sizes.
        attention: layer index → attention module; default rotary self-attention under a policy.
        ratio: inner width of the MLP over ``dim``.
        seed: of the initial weights.

    Raises:
        ConfigError: sizes below 1, or that do not divide each other.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int = 128,
        depth: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        *,
        attention: AttentionFactory | None = None,
        ratio: float = 2.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(self, vocab_size=vocab_size, dim=dim, depth=depth, num_heads=num_heads, num_kv_heads=num_kv_heads)
        attention = attention or factory(dim, num_heads, num_kv_heads)
        self.vocab_size = vocab_size
        self.embed = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(Block(dim, attention(i), ratio) for i in range(depth))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocab_size, bias=False)
        initialise(self, depth, seed)

    def begin(
        self, ids: Tensor, policy: Method | None = None, memory: Memory | None = None, *, valid: Tensor | None = None,
        states: dict[int, State] | None = None, impl: str = "auto", measuring: bool = False,
    ) -> Pass:  # fmt: skip
        """The pass that :meth:`forward` runs over ``ids`` ``(B, N)``; ``valid`` ``(B, n + N)`` is False on padding."""
        if memory is not None:
            check_depth(memory, len(self.layers))
        before = 0 if memory is None else memory.length
        total = before + ids.shape[1]
        base = BaseMask.build(ids.shape[1], total, causal=True, shift=before, valid=valid, device=ids.device)
        positions = torch.arange(before, total, device=ids.device)[:, None]
        return Pass(
            chosen(policy), base, positions, len(self.layers), memory,
            {} if states is None else states, impl=impl, measuring=measuring,
        )  # fmt: skip

    def forward(
        self,
        ids: Tensor,
        policy: Method | None = None,
        memory: Memory | None = None,
        *,
        run: Pass | None = None,
    ) -> Tensor:
        """``(B, N, vocab)`` logits.

        Args:
            ids: ``(B, N)`` int64.
            policy: what the attention layers keep; default everything.
            memory: of earlier calls; grows in place.
            run: a pass from :meth:`begin`, for padding, measuring, or another implementation.

        Raises:
            ShapeError: ids of another shape, dtype or range, or a memory of another batch or model.
        """
        check_ids(ids, self.vocab_size)
        run = self.begin(ids, policy, memory) if run is None else run
        if run.memory is not None:
            check_depth(run.memory, len(self.layers))
            run.memory.layers = len(self.layers)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, run)
        return self.head(self.norm(x))

    def loss(self, ids: Tensor, scored: Tensor | None = None, policy: Method | None = None) -> Tensor:
        """Mean next-token loss in nats; ``scored`` ``(B, N)`` bool says which tokens of ``ids`` count as targets.

        Raises:
            ShapeError: less than two tokens, or ``scored`` of another shape or dtype.
        """
        check_ids(ids, self.vocab_size)
        if ids.shape[0] < 1 or ids.shape[1] < 2:
            raise ShapeError(f"ids has shape {tuple(ids.shape)}; expected (batch, length) of at least 1 and 2.")
        if scored is not None:
            check_marks("scored", scored, ids)
        logits = self(ids[:, :-1], policy)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        if scored is None:
            return losses.mean()
        weight = scored[:, 1:].flatten().to(losses.dtype)
        return (losses * weight).sum() / weight.sum().clamp(min=1)

    @torch.inference_mode()
    def generate(self, ids: Tensor, count: int, policy: Method | None = None, stop: Sequence[int] = ()) -> Tensor:
        """``(B, ≤ count)`` tokens decoded greedily after ``ids`` ``(B, N)``; ends early when every row has met a ``stop`` token."""
        memory, out = Memory(), []
        ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for _ in range(count):
            ids = self(ids, policy, memory)[:, -1].argmax(-1, keepdim=True)
            out.append(ids)
            ended |= torch.isin(ids[:, 0], torch.tensor(list(stop), dtype=ids.dtype, device=ids.device))
            if bool(ended.all()):
                break
        return torch.cat(out, 1) if out else ids[:, :0]
