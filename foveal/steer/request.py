"""A prompt whose tokens can be named: by position, as the image, as the user's text, or by the words that they spell."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..hf.vision import image_tokens

NAMES = ("image", "user", "first")
_POSITIONS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def numbers(text: str) -> list[int]:
    """``"0,4-6"`` → 0, 4, 5, 6.

    Raises:
        ConfigError: a range that runs backwards, or something else than numbers.
    """
    found: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()) or (dash and int(high) < int(low)):
            raise ConfigError(f"{text!r} holds {part!r}; expected numbers and rising ranges such as 0,4-6.")
        found.extend(range(int(low), int(high if dash else low) + 1))
    return found


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt as a model gets it.

    Attributes:
        inputs: what ``generate`` takes; ``input_ids`` ``(1, N)``. prompt: the user's own text in it.
        decode: token ids → text without special tokens. image: ``(N,)`` bool, image tokens.
    """

    inputs: Mapping[str, Any]
    prompt: str
    decode: Callable[[list[int]], str]
    image: Tensor

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Mapping[str, Any], prompt: str, decode: Callable[[list[int]], str]
    ) -> Request:
        """The request, with its image tokens found where there are pictures among the inputs."""
        ids = inputs["input_ids"]
        pictures = any("pixel" in name for name in inputs)
        image = image_tokens(model).mask(ids)[0].cpu() if pictures else torch.zeros(ids.shape[1], dtype=torch.bool)
        return cls(inputs, prompt, decode, image)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.image)

    def span(self, words: str) -> Tensor:
        """``(N,)`` bool: the tokens that ``words`` names.

        Args:
            words: positions such as ``0,4-6``; ``image``, ``user`` or ``first``; anything else, or what follows ``text:``, is text that
                the prompt holds: every place where it stands, whole tokens, spaces aside.

        Raises:
            ConfigError: positions outside the prompt, no image in it, or text that it does not hold.
        """
        words = words.strip()
        if words == "image":
            if not bool(self.image.any()):
                raise ConfigError("'image' names image tokens, but this prompt has no picture; add one (--image FILE).")
            return self.image
        if words == "user":
            return self.user
        if words == "first":
            return torch.arange(self.length) == 0
        if _POSITIONS.fullmatch(words):
            at = numbers(words)
            if max(at) >= self.length:
                raise ConfigError(f"{words!r} names position {max(at)}; the prompt has {self.length} tokens, 0 to {self.length - 1}.")  # fmt: skip
            return torch.isin(torch.arange(self.length), torch.tensor(at))
        return self._spelling(words.removeprefix("text:"))

    @functools.cached_property
    def user(self) -> Tensor:
        """``(N,)`` bool: the user's text, without the chat template around it."""
        return self._spelling(self.prompt, last=True)

    @functools.cached_property
    def pieces(self) -> list[tuple[int, int, str]]:
        """``(first token, last token + 1, text without spaces)``; tokens that share a character are one piece."""
        out: list[tuple[int, int, str]] = []
        broken: list[int] = []
        for i, token in enumerate(self.inputs["input_ids"][0].tolist()):
            text = "" if bool(self.image[i]) else self.decode([token])
            if "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
                broken.append(token)
                text = self.decode(broken)
                if "\N{REPLACEMENT CHARACTER}" in text:
                    continue
            out.append((i - max(len(broken) - 1, 0), i + 1, "".join(text.split())))
            broken = []
        return out

    def _spelling(self, words: str, last: bool = False) -> Tensor:
        wanted = "".join(words.split())
        whole = "".join(text for _, _, text in self.pieces)
        starts = [m.start() for m in re.finditer(f"(?={re.escape(wanted)})", whole)] if wanted else []
        if not starts:
            raise ConfigError(f"the prompt's tokens do not spell {words[:60]!r}; expected text that stands in it, positions such as 0,4-6, or one of {', '.join(NAMES)}.")  # fmt: skip
        found = torch.zeros(self.length, dtype=torch.bool)
        at = 0
        for first, end, text in self.pieces:
            if any(at < start + len(wanted) and at + len(text) > start for start in (starts[-1:] if last else starts)):
                found[first:end] = True
            at += len(text)
        return found
