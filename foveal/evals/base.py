"""What a task is: items made from a text and a seed. A file in this folder with ``@register("task", …)`` is a task.

Two kinds of items exist. A :class:`Passage` is read once, and every position is scored. A :class:`Quiz` is a context that is read
once, and questions that are asked after it one by one, each from the same cache; of each, the right answer and wrong ones are
scored token by token, as they would be decoded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..core.errors import ConfigError
from ..core.registry import entries, lookup
from ..data.text import need

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Material:
    """What tasks are made from.

    Attributes:
        tokenizer: the model's. ids: ``(N,)`` tokens of the text. ahead: ``(P,)`` what the tokenizer puts before a text.
        context: tokens at most, of everything. trials: items of each setting. seed: of all random choices.
        chat: ask in the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: Tensor
    ahead: Tensor
    context: int
    trials: int
    seed: int
    chat: bool

    def generator(self, *names: object) -> torch.Generator:
        """Random numbers that depend on the seed and the names alone."""
        digest = hashlib.sha256("/".join(map(str, (self.seed, *names))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def excerpt(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` consecutive tokens of the text from a random place; raises :class:`DataError` when it is too short."""
        need(self.ids, count)
        start = int(torch.randint(len(self.ids) - count + 1, (), generator=generator))
        return self.ids[start : start + count]


@dataclass(frozen=True, eq=False)
class Passage:
    """Text to read; ``key`` names it in the journal, ``ids`` ``(N,)``."""

    key: str
    ids: Tensor


@dataclass(frozen=True, eq=False)
class Ask:
    """One question.

    Attributes:
        ids: ``(Q,)`` tokens after the context. answer: ``(A,)`` the right continuation. others: wrong ones; none where every other
            token is as wrong.
        at: coordinates, such as ``{"depth": 0.5, "length": 4096}``.
    """

    ids: Tensor
    answer: Tensor
    others: tuple[Tensor, ...]
    at: dict[str, float]

    @property
    def longest(self) -> int:
        """Tokens of the longest answer."""
        return max(len(a) for a in (self.answer, *self.others))


@dataclass(frozen=True, eq=False)
class Quiz:
    """A context ``(N,)`` and its questions; ``key`` names it in the journal."""

    key: str
    context: Tensor
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class Task:
    """Base of all tasks.

    Attributes:
        title, about: for people. axes: the coordinates of :class:`Ask` that are columns and rows of the heat map; none for tasks
            that score positions. measure: ``"nll"`` or ``"kl"`` of those. needs_policy: says nothing about the dense model alone.
        order: of tasks in a run and in its report.
    """

    registered_name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    about: ClassVar[str] = ""
    axes: ClassVar[tuple[str, str] | None] = None
    measure: ClassVar[str] = ""
    needs_policy: ClassVar[bool] = False
    order: ClassVar[int] = 0

    def items(self, material: Material) -> list[Passage | Quiz]:
        """Everything to measure.

        Raises:
            DataError: the text is too short. ConfigError: the context is.
        """
        raise NotImplementedError


def at_lengths(
    material: Material, make: Callable[[Material, int, int], Quiz], halvings: int = 3
) -> list[Passage | Quiz]:
    """``make(material, length, trial)`` at the context and at halves of it that have room, shortest first.

    Raises:
        ConfigError: the context itself has no room.
    """
    found: list[Passage | Quiz] = []
    for halving in range(halvings, -1, -1):
        try:
            found += [make(material, material.context >> halving, trial) for trial in range(material.trials)]
        except ConfigError:
            if not halving:
                raise
    return found


def tasks() -> dict[str, type[Task]]:
    """All tasks by name, in the order in which they are run and shown."""
    found = entries("task")
    return dict(sorted(found.items(), key=lambda pair: (pair[1].order, pair[0])))


def task(name: str) -> Task:
    """The task of that name; raises :class:`ConfigError` with the nearest known one."""
    made: Task = lookup("task", name)()
    return made
