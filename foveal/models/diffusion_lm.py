"""A small masked-diffusion language model of LLaDA's kind (arXiv 2502.09992): bidirectional, trained to fill masks.

Training: a share t ~ U(ε, 1) of the answer's tokens is masked; loss = Σ over masked tokens of −log p / t, over the length.
Sampling: all masks at first; each step predicts every mask and keeps the most confident ones; block by block from the left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.context import State
from ..core.errors import ConfigError, ShapeError
from ..core.serial import check_sizes
from .blocks import (
    AttentionFactory,
    Block,
    Method,
    Pass,
    check_ids,
    check_marks,
    chosen,
    factory,
    initialise,
)

LEAST_MASKED = 1e-3
"""ε: the smallest share of tokens masked in training."""


class DiffusionLM(nn.Module):
    """Masked-diffusion language model; the mask token is number ``vocab_size``.

    Args:
        vocab_size: tokens without the mask. dim, depth, num_heads: sizes.
        attention: layer index → attention module; default rotary self-attention under a policy.
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
        *,
        attention: AttentionFactory | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(self, vocab_size=vocab_size, dim=dim, depth=depth, num_heads=num_heads)
        attention = attention or factory(dim, num_heads)
        self.vocab_size, self.mask = vocab_size, vocab_size
        self.embed = nn.Embedding(vocab_size + 1, dim)
        self.layers = nn.ModuleList(Block(dim, attention(i)) for i in range(depth))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocab_size, bias=False)
        initialise(self, depth, seed)

    def begin(
        self, ids: Tensor, policy: Method | None = None, *, states: dict[int, State] | None = None,
        step: int | None = None, impl: str = "auto", measuring: bool = False,
    ) -> Pass:  # fmt: skip
        """The pass that :meth:`forward` runs over ``ids`` ``(B, N)``."""
        length = ids.shape[1]
        base = BaseMask.build(length, length, causal=False, device=ids.device)
        return Pass(
            chosen(policy), base, torch.arange(length, device=ids.device)[:, None],
            len(self.layers), states={} if states is None else states, step=step, impl=impl, measuring=measuring,
        )  # fmt: skip

    def forward(self, ids: Tensor, policy: Method | None = None, *, run: Pass | None = None) -> Tensor:
        """``(B, N, vocab)`` logits of every token, masked or not; raises :class:`ShapeError` for bad ids."""
        check_ids(ids, self.vocab_size + 1)
        run = self.begin(ids, policy) if run is None else run
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, run)
        return self.head(self.norm(x))

    def loss(self, ids: Tensor, answer: Tensor, generator: torch.Generator, policy: Method | None = None) -> Tensor:
        """The bound on −log p(answer | rest) per answer token, nats.

        Args:
            ids: ``(B, N)`` whole sequences.
            answer: ``(B, N)`` bool, tokens that may be masked.
            generator: draws the shares and the masks, on the CPU.

        Raises:
            ShapeError: bad ids, or ``answer`` of another shape or dtype.
        """
        check_ids(ids, self.vocab_size)
        check_marks("answer", answer, ids)
        share = LEAST_MASKED + (1 - LEAST_MASKED) * torch.rand(ids.shape[0], 1, generator=generator)
        masked = (torch.rand(ids.shape, generator=generator) < share).to(ids.device) & answer
        logits = self(torch.where(masked, self.mask, ids), policy)
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
        return (losses * masked / share.to(losses)).sum() / answer.sum().clamp(min=1)

    @torch.inference_mode()
    def sample(
        self,
        prompt: Tensor,
        length: int,
        steps: int,
        *,
        block: int | None = None,
        given: Tensor | None = None,
        policy: Method | None = None,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        watch: Callable[[Pass], None] | None = None,
    ) -> Tensor:
        """Fill ``length`` masks after ``prompt`` ``(B, P)``; returns ``(B, P + length)``.

        Args:
            steps: denoising steps in all; each unmasks an equal share of its block, the most confident first.
            block: tokens filled together, from the left; default all. A divisor of ``length``, and the number of blocks one of ``steps``.
            given: ``(B, length)`` answer tokens known beforehand, the mask token where one is to be found; default all masks.
            policy: what the attention keeps; patterns keep their state over all steps and know the step's number.
            temperature: 0 takes the likeliest token; above, Gumbel noise of this size is added to the logits.
            generator: draws the noise.
            watch: called with every finished pass.

        Raises:
            ConfigError: numbers that do not divide each other.
            ShapeError: ``given`` of another shape.
        """
        block = length if block is None else block
        if length < 1 or block < 1 or length % block or steps < 1 or steps % (length // block):
            raise ConfigError(
                f"sample has length={length}, block={block}, steps={steps}; expected a block that divides the length, and a "
                "multiple of the number of blocks as steps."
            )
        given = prompt.new_full((prompt.shape[0], length), self.mask) if given is None else given
        if tuple(given.shape) != (prompt.shape[0], length):
            raise ShapeError(f"given has shape {tuple(given.shape)}; expected ({prompt.shape[0]}, length={length}).")
        ids = torch.cat([prompt, given], 1)
        per_block = steps // (length // block)
        states: dict[int, State] = {}
        step = 0
        for first in range(prompt.shape[1], ids.shape[1], block):
            for left in range(per_block, 0, -1):
                run = self.begin(ids, policy, states=states, step=step)
                logits = self(ids, run=run)
                if watch is not None:
                    watch(run)
                ids = self._unmask(ids, logits, first, block, left, temperature, generator)
                step += 1
        return ids

    def _unmask(
        self, ids: Tensor, logits: Tensor, first: int, block: int, left: int, temperature: float, generator: torch.Generator | None
    ) -> Tensor:  # fmt: skip
        """Keep the most confident predictions of one block: all remaining masks when ``left`` is 1, else their share."""
        here = slice(first, first + block)
        logits = logits[:, here].float()
        noisy = logits
        if temperature > 0:
            uniform = torch.rand(logits.shape, generator=generator).to(logits.device).clamp(min=1e-20)
            noisy = logits - temperature * torch.log(-torch.log(uniform))
        guess = noisy.argmax(-1)
        open_ = ids[:, here] == self.mask
        sure = torch.softmax(logits, -1).gather(-1, guess[..., None])[..., 0].masked_fill(~open_, -torch.inf)
        count = -(-open_.sum(1) // left)
        rank = sure.argsort(dim=1, descending=True, stable=True).argsort(1)
        keep = open_ & (rank < count[:, None])
        out = ids.clone()
        out[:, here] = torch.where(keep, guess, ids[:, here])
        return out
