"""A sentence hidden in real text, and a question about it: the needle test of arXiv 2411.02688 with needles of our own.

Haystack and needle are one user message; the answer may be begun for the model (response prefix). Recall is the share of the
needle's key words that the answer holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import ConfigError, DataError
from .text import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Needle:
    """A sentence: how it begins, the words that an answer must hold, and the question for it."""

    begins: str
    ends: str
    keywords: tuple[str, ...]
    question: str

    @property
    def sentence(self) -> str:
        """The whole."""
        return f"{self.begins} {self.ends}."


NEEDLES = (
    Needle("The best thing to bring to the lake is", "a red kite and a basket of warm bread", ("red", "kite", "basket", "warm", "bread"), "What is the best thing to bring to the lake?"),
    Needle("The old clock tower in Lisbon is opened with", "a silver key and a whispered poem", ("silver", "key", "whispered", "poem"), "What is the old clock tower in Lisbon opened with?"),
    Needle("The baker of Oslo paints every loaf with", "blue flowers and golden stars", ("blue", "flowers", "golden", "stars"), "What does the baker of Oslo paint every loaf with?"),
    Needle("The hidden garden behind the station grows", "purple carrots and tiny melons", ("purple", "carrots", "tiny", "melons"), "What does the hidden garden behind the station grow?"),
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A user message that holds the needle, and the begun answer."""

    user: str
    prefix: str
    needle: Needle
    length: int
    depth: float


def hide(tokenizer: PreTrainedTokenizerBase, text: str, needle: Needle, length: int, depth: float) -> Prompt:
    """Put a needle into the first ``length`` tokens of ``text`` (line breaks removed), at the end of the sentence before ``depth``.

    Args:
        tokenizer: counts. length: tokens of the user message without the question, about. depth: from 0 to 1.

    Raises:
        ConfigError: depth out of range, or a length that the needle fills. DataError: a text that is too short.
    """
    own = len(tokens(tokenizer, needle.sentence))
    if not 0 <= depth <= 1 or length <= own + 16:
        raise ConfigError(f"depth is {depth} and length {length}; expected 0 to 1, and more than {own + 16} tokens.")
    flat = re.sub(r"\s+", " ", text).strip()
    ids = tokens(tokenizer, flat[: 12 * length])
    if len(ids) < length - own:
        raise DataError(f"the text has {len(ids)} tokens; expected {length - own} for a haystack of {length}.")
    hay = str(tokenizer.decode(ids[: length - own]))
    at = int(depth * len(hay))
    at = len(hay) if depth == 1 else hay.rfind(". ", 0, at) + 2 if ". " in hay[:at] else 0
    context = f"{hay[:at]} {needle.sentence} {hay[at:]}".strip()
    return Prompt(f"{context}\n\n{needle.question}", needle.begins, needle, length, depth)
