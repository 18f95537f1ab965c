"""What Flux's routers are trained on: prompts that must look far back against prompts that need not, all from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError
from ..data import needle
from ..data.synthetic import Task, key_values, markov
from ..data.text import prefix
from .flux import RoutedTask, Samples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RETRIEVAL, LOCAL = "retrieval", "local"


def synthetic_tasks(
    length: int, pairs: int, asked: int, table: Tensor, targets: tuple[float, float] = (0.4, 1.0), keys: int = 64, values: int = 64
) -> list[RoutedTask]:  # fmt: skip
    """Key–value retrieval (``pairs`` spread over ``length`` tokens, ``asked`` of them asked for) and a Markov chain over ``table``.

    The prompt of the first ends with the separator, that of the second after as many tokens.
    """
    room = length - 2 * asked

    def retrieval(rows: int, generator: torch.Generator) -> Samples:
        return _samples(key_values(rows, pairs, asked, generator, keys=keys, values=values, length=length), room)

    def local(rows: int, generator: torch.Generator) -> Samples:
        task = markov(rows, length, generator, table=table)
        answer = task.answer & (torch.arange(length) >= room)
        return _samples(Task(task.ids, answer), room)

    return [RoutedTask(RETRIEVAL, targets[0], retrieval), RoutedTask(LOCAL, targets[1], local)]


def _samples(task: Task, prompt: int) -> Samples:
    return Samples(task.ids, task.answer, torch.full((task.ids.shape[0],), prompt))


def text_tasks(
    tokenizer: PreTrainedTokenizerBase, ids: Tensor, length: int, targets: tuple[float, float] = (0.45, 1.0), tail: int = 64
) -> list[RoutedTask]:  # fmt: skip
    """The same on a text: an invented fact hidden at a random depth and asked for, and the text's own last ``tail`` tokens.

    Args:
        tokenizer: the model's. ids: ``(T,)`` tokens of the text, long enough for many different pieces.
        length: tokens per sample, question and answer included.

    Raises:
        DataError: the text is too short. ConfigError: a length too short.
    """
    if length < 4 * tail:
        raise ConfigError(f"samples of {length} tokens leave no distance for a tail of {tail}; expected at least {4 * tail} tokens.")  # fmt: skip
    if len(ids) < 2 * length:
        raise DataError(f"the text has {len(ids)} tokens; expected at least {2 * length} for samples of {length}. Pass a longer text.")  # fmt: skip
    ahead = prefix(tokenizer)

    def piece(count: int, generator: torch.Generator) -> Tensor:
        start = int(torch.randint(len(ids) - count + 1, (), generator=generator))
        return ids[start : start + count]

    def retrieval(rows: int, generator: torch.Generator) -> Samples:
        made = []
        for _ in range(rows):
            hay = piece(length, generator)
            depth = 0.02 + 0.6 * float(torch.rand((), generator=generator))
            seed = int(torch.randint(1 << 30, (), generator=generator))
            found = needle.build(tokenizer, hay, length, depths=(depth,), seed=seed)
            question = found.questions[0]
            made.append((torch.cat([found.context, question.ids]), question.answer))
        return padded(made)

    def local(rows: int, generator: torch.Generator) -> Samples:
        made = []
        for _ in range(rows):
            text = torch.cat([ahead, piece(length - len(ahead), generator)])
            made.append((text[:-tail], text[-tail:]))
        return padded(made)

    return [RoutedTask(RETRIEVAL, targets[0], retrieval), RoutedTask(LOCAL, targets[1], local)]


def padded(rows: Sequence[tuple[Tensor, Tensor]]) -> Samples:
    """A batch of ``(prompt, answer)`` rows, padded with token 0 on the right."""
    width = max(len(p) + len(a) for p, a in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    scored = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.cat([prompt, answer])
        scored[i, len(prompt) : end] = True
    return Samples(ids, scored, torch.tensor([len(p) for p, _ in rows]))
