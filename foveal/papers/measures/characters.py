"""Next-character prediction on the packaged prose, for measures that need a small language model and real text."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...data.text import load_text
from ...models import DecoderLM
from ...recipes.fit import fit

HELD_OUT = 32
"""Windows of held-out text that are scored."""


@functools.cache
def characters() -> tuple[Tensor, Tensor, int]:
    """Training text, the last twentieth held out, and the size of the vocabulary (characters beyond ASCII are one token)."""
    ids = torch.tensor([min(ord(c), 127) for c in load_text()])
    used = torch.unique(ids)
    ids = torch.searchsorted(used, ids)
    cut = len(ids) * 19 // 20
    return ids[:cut], ids[cut:], len(used)


def windows(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``(batch, length + 1)`` random windows of the training text."""
    text, _, _ = characters()
    start = torch.randint(len(text) - length, (batch, 1), generator=generator)
    return text[start + torch.arange(length + 1)]


def taught(
    model: DecoderLM, length: int, *, batch: int, steps: int, rate: float, seed: int, warmup: int = 20
) -> dict[str, float]:
    """:func:`judged` after training on random windows."""
    fit(model, lambda _, g: model.loss(windows(batch, length, g)), steps, lr=rate, warmup=min(warmup, steps), seed=seed)
    return judged(model, length)


@torch.no_grad()
def judged(model: DecoderLM, length: int) -> dict[str, float]:
    """Loss in nats and accuracy on evenly spaced windows of the held-out text."""
    _, text, _ = characters()
    start = torch.linspace(0, len(text) - length - 1, HELD_OUT).long()[:, None]
    ids = text[start + torch.arange(length + 1)]
    logits, target = model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits, target)
    return {"loss": float(loss), "accuracy": float((logits.argmax(-1) == target).double().mean())}
