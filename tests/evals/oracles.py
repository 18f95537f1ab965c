"""Models whose answers are known beforehand. They keep the tokens themselves in the key-value cache, so that rewinding is real."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from foveal.evals.base import Quiz

SURE = 12.0
"""Logit of what an oracle predicts; all others are 0."""


class Oracle(LlamaForCausalLM):
    """A causal language model that predicts by a rule, :meth:`next`."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__(
            LlamaConfig(vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        )  # fmt: skip
        self.eval()

    def next(self, seen: list[int]) -> int | None:
        """The token after ``seen``; None: no idea, all tokens alike."""
        return None

    def forward(self, input_ids: Tensor, past_key_values: Any = None, logits_to_keep: Any = 0, **_: Any) -> Any:  # type: ignore[override]
        seen = input_ids[0].tolist()
        if past_key_values is not None:
            keys = input_ids.float()[:, None, :, None]
            seen = past_key_values.layers[0].update(keys, keys)[0][0, 0, :, 0].long().tolist()
        new = len(input_ids[0])
        rows = torch.arange(new)
        rows = rows[logits_to_keep] if isinstance(logits_to_keep, Tensor) else rows[-logits_to_keep:]
        logits = torch.zeros(1, len(rows), self.config.vocab_size)
        for i, row in enumerate(rows.tolist()):
            token = self.next(seen[: len(seen) - new + row + 1])
            if token is not None:
                logits[0, i, token] = SURE
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)


class Copier(Oracle):
    """Goes on as the text did after the longest earlier occurrence of what it ends with."""

    def next(self, seen: list[int]) -> int | None:
        text = torch.tensor(seen)
        alive = (text[:-1] == text[-1]).nonzero()[:, 0]
        back = 1
        while len(alive) > 1 and back < len(seen):
            longer = alive[(alive >= back) & (text[(alive - back).clamp(min=0)] == text[-1 - back])]
            if not len(longer):
                break
            alive, back = longer, back + 1
        return int(text[alive[-1] + 1]) if len(alive) else None


class Knower(Oracle):
    """Has the right answers to quizzes; with ``wrong`` it gives the first of the wrong ones instead."""

    def __init__(self, vocabulary: int, quizzes: list[Quiz], wrong: bool = False) -> None:
        super().__init__(vocabulary)
        self.known = [
            ([*quiz.context.tolist(), *ask.ids.tolist()], (ask.others[0] if wrong else ask.answer).tolist())
            for quiz in quizzes
            for ask in quiz.asks
        ]

    def next(self, seen: list[int]) -> int | None:
        for prompt, answer in self.known:
            given = seen[len(prompt) :]
            if len(given) < len(answer) and seen[: len(prompt)] == prompt and answer[: len(given)] == given:
                return answer[len(given)]
        return None
