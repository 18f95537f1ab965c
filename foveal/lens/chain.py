"""A decoder as the chain prompt X → latents Z → answer Y, read after a fixed suffix (teacher forcing)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError
from .latents import Hook


@dataclass(frozen=True)
class Chain:
    """How a decoder is run as X → Z → Y.

    Attributes:
        model: takes ``inputs_embeds``. steps: latent tokens after the prompt. suffix: ids after them; the last one's logits are the answer.
        hidden: range ``(first, after)`` of prompt positions that are hidden while the answer is read, or None. A mask that cuts these
            edges needs no training and is a cleaner intervention than noise.
        blind: who does not see them: "suffix", what follows the latents, or "latents", these too. With "suffix" the prompt still reaches
            the answer beside Z, through the keys that latent positions get in the second layer and later; only "latents" makes the
            vectors Z the one way.
    """

    model: nn.Module
    steps: int
    suffix: tuple[int, ...]
    hidden: tuple[int, int] | None = None
    blind: str = "suffix"

    def __post_init__(self) -> None:
        if self.steps < 0 or not self.suffix:
            raise ConfigError(
                f"steps is {self.steps} and suffix {self.suffix}; expected 0 or more steps and at least one id after them."
            )
        if self.blind not in ("suffix", "latents"):
            raise ConfigError(f"blind is {self.blind!r}; expected 'suffix' or 'latents'.")

    def think(self, ids: Tensor, hook: Hook | None = None) -> Tensor:
        """``(B, K, D)`` latents of the prompts ``ids`` ``(B, N)``, each step seeing those before; differentiable without a hook."""
        x, found = self._embed(ids), []
        for step in range(self.steps):
            z = self._forward(x, ids.shape[1]).hidden_states[-1][:, -1]
            if hook is not None:
                z = torch.stack([hook(b, step, one) for b, one in enumerate(z)]).to(z)
            found.append(z)
            x = torch.cat([x, z[:, None]], 1)
        return torch.stack(found, 1) if found else x[:, :0]

    def answer(self, ids: Tensor, latents: Tensor) -> Tensor:
        """``(B, V)`` logits after prompt, given latents ``(B, K, D)`` and suffix.

        Raises:
            ShapeError: latents that do not fit.
        """
        if latents.dim() != 3 or latents.shape[:2] != (ids.shape[0], self.steps):
            raise ShapeError(f"latents has shape {tuple(latents.shape)}; expected ({ids.shape[0]}, {self.steps}, D).")
        tail = torch.tensor(self.suffix, device=ids.device).expand(ids.shape[0], -1)
        x = torch.cat([self._embed(ids), latents, self._embed(tail)], 1)
        logits: Tensor = self._forward(x, ids.shape[1]).logits[:, -1]
        return logits

    def _embed(self, ids: Tensor) -> Tensor:
        model: Any = self.model
        embedded: Tensor = model.get_input_embeddings()(ids)
        return embedded

    def _forward(self, x: Tensor, prompt: int) -> Any:
        mask = None
        if self.hidden is not None and x.shape[1] > prompt + self.steps:
            first, after = self.hidden
            allowed = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            allowed[prompt + (self.steps if self.blind == "suffix" else 0) :, first:after] = False
            mask = torch.zeros(allowed.shape, dtype=x.dtype, device=x.device).masked_fill(
                ~allowed, torch.finfo(x.dtype).min
            )
            mask = mask.expand(x.shape[0], 1, -1, -1)
        return self.model(inputs_embeds=x, attention_mask=mask, use_cache=False, output_hidden_states=True)
