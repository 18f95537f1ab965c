"""Long copy: the model reads a text, gets a few words of it again, and must go on word for word.

There are no wrong answers to choose from: at every token each other token is as wrong, so the margin is that to the best of them.
The words that the model could guess without the text are in the figures too; compare with the same model under another attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.registry import register
from ..data.needle import frame
from ..data.text import tokens
from .base import Ask, Material, Passage, Quiz, Task, at_lengths

DEPTHS, CUE, COPIED = (0.05, 0.35, 0.65, 0.95), 16, 32
"""Where the words to copy begin; tokens given; tokens asked for."""


@register("task", "copy")
@dataclass(frozen=True)
class Copy(Task):
    """16 tokens of the text again, and 32 to go on with, at four depths; the context and halves of it."""

    title = "Long copy"
    about = "A few words of the text are repeated, and the model must go on word for word; the margin is to the best other token."
    axes = ("length", "depth")
    order = 5

    def items(self, material: Material) -> list[Passage | Quiz]:
        return at_lengths(material, _quiz)


def _quiz(material: Material, length: int, trial: int) -> Quiz:
    key = f"copy.{length}.{trial}"
    before, (after,) = frame(
        material.tokenizer, [("Repeat the text from the words that follow, word for word.", "")], material.chat
    )
    asking = tokens(material.tokenizer, after)
    room = length - len(before) - len(asking) - CUE - COPIED
    if room < 2 * (CUE + COPIED):
        raise ConfigError(
            f"a context of {length} tokens has no room for copy: {room} tokens of text are left, and {2 * (CUE + COPIED)} are needed; "
            "pass a longer --context, or other --tasks."
        )
    text = material.excerpt(room, material.generator(key))
    asks = []
    for depth in DEPTHS:
        at = _unique(text, round(depth * (room - CUE - COPIED)), room - CUE - COPIED)
        cue, answer = text[at : at + CUE], text[at + CUE : at + CUE + COPIED]
        asks.append(Ask(torch.cat([asking, cue]), answer, (), {"length": length, "depth": depth}))
    return Quiz(key, torch.cat([before, text]), tuple(asks))


def _unique(text: Tensor, at: int, last: int) -> int:
    """The first place from ``at`` on, else before it, whose cue stands nowhere else in the text; ``at`` when there is none."""
    cues = text.unfold(0, CUE, 1)
    for place in (*range(at, last + 1), *range(at - 1, -1, -1)):
        if int((cues == cues[place]).all(1).sum()) == 1:
            return place
    return at
