"""Pairs of a clean and a corrupted prompt that differ in what decides the answer, aligned token by token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError, nearest
from .text import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "end"
"""Name of a prompt's last position, which every set of pairs has."""


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Prompts padded on the right.

    Attributes:
        name: of the task. clean, corrupt: ``(B, N)`` token ids. correct: ``(B,)`` the clean answer. foil: ``(B,)`` the wrong one.
        places: named positions, ``(B, K)`` each; ``places["end"]`` is the last token.
        choices: ``(B, C)`` tokens among which an answer is chosen, the correct one first.
        settings: how they were made.
    """

    name: str
    clean: Tensor
    corrupt: Tensor
    correct: Tensor
    foil: Tensor
    places: Mapping[str, Tensor]
    choices: Tensor
    settings: Mapping[str, Any]

    def __len__(self) -> int:
        return self.clean.shape[0]

    def place(self, name: str) -> Tensor:
        """Positions ``(B, K)`` by name; ``"all"`` are those from the first token that differs to the end."""
        if name == "all":
            first = int((self.clean != self.corrupt).any(0).int().argmax())
            return torch.arange(first, self.clean.shape[1]).expand(len(self), -1)
        if name not in self.places:
            raise ConfigError(
                f"the pairs of {self.name!r} have no place {name!r}. {nearest(name, [*self.places, 'all'])}"
            )
        return self.places[name]

    def to(self, device: torch.device | str) -> PromptPairs:
        """The same on a device."""
        places = {name: where.to(device) for name, where in self.places.items()}
        moved = {name: getattr(self, name).to(device) for name in ("clean", "corrupt", "correct", "foil", "choices")}
        return replace(self, places=places, **moved)


@dataclass(frozen=True)
class Pair:
    """One pair as text; ``places`` are token positions (one or more), without ``"end"``."""

    clean: str
    corrupt: str
    correct: str
    foil: str
    places: Mapping[str, Sequence[int]]
    choices: Sequence[str]


def align(
    tokenizer: PreTrainedTokenizerBase, name: str, pairs: Sequence[Pair], settings: Mapping[str, Any]
) -> PromptPairs:
    """Tokenise and stack, without special tokens.

    Raises:
        DataError: no pairs, a pair whose sides differ in length or not at all, or an answer that is not one token.
    """
    if not pairs:
        raise DataError(f"there are no pairs for {name!r}; expected at least one.")
    clean = [tokens(tokenizer, pair.clean) for pair in pairs]
    corrupt = [tokens(tokenizer, pair.corrupt) for pair in pairs]
    for a, b, pair in zip(clean, corrupt, pairs, strict=True):
        if len(a) != len(b):
            raise DataError(
                f"the clean prompt has {len(a)} tokens and its corruption {len(b)}; patching needs the same positions on both sides: "
                f"replace words by words of as many tokens ({pair.corrupt!r})."
            )
    width = max(map(len, clean))

    def stack(rows: Iterable[Tensor]) -> Tensor:
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=int(row[-1])) for row in rows])

    def answer(word: str) -> int:
        ids = tokens(tokenizer, word)
        if len(ids) != 1:
            raise DataError(f"the answer {word!r} is {len(ids)} tokens of this tokenizer; expected one.")
        return int(ids[0])

    places = {key: torch.tensor([list(pair.places[key]) for pair in pairs]) for key in pairs[0].places}
    places[END] = torch.tensor([[len(row) - 1] for row in clean])
    correct, foil = (torch.tensor([answer(word) for word in words]) for words in (
        [pair.correct for pair in pairs], [pair.foil for pair in pairs]))  # fmt: skip
    choices = torch.tensor([[answer(word) for word in pair.choices] for pair in pairs])
    return PromptPairs(name, stack(clean), stack(corrupt), correct, foil, places, choices, dict(settings))


def single_tokens(tokenizer: PreTrainedTokenizerBase, words: Iterable[str], least: int, what: str) -> list[str]:
    """Those words that are one token after a space.

    Raises:
        DataError: fewer than ``least`` are.
    """
    kept = [word for word in words if len(tokens(tokenizer, f" {word}")) == 1]
    if len(kept) < least:
        raise DataError(
            f"only {len(kept)} of the {what} are single tokens of this tokenizer; expected at least {least}."
        )
    return kept


def find(ids: Tensor, token: int, what: str) -> list[int]:
    """Positions of a token in ``ids`` ``(N,)``.

    Raises:
        DataError: there is none.
    """
    found: list[int] = (ids == token).nonzero()[:, 0].tolist()
    if not found:
        raise DataError(f"{what} is not in the prompt as one token; there is no subject to patch.")
    return found
