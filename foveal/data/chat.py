"""A conversation as tokens that know whose they are: the user's, the assistant's, the template's, or the first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER, ASSISTANT, TEMPLATE, BOS = range(4)
ROLES = ("user", "assistant", "template", "bos")
"""Names of the roles by number; system messages count as template."""

Message = Mapping[str, str]
"""``{"role": "user" | "assistant" | "system", "content": text}``."""


@dataclass(frozen=True, eq=False)
class Chat:
    """One conversation.

    Attributes:
        ids: ``(N,)`` tokens. role: ``(N,)`` one of USER, ASSISTANT, TEMPLATE, BOS. turn: ``(N,)`` index of the message whose
            content the token belongs to, −1 for the template's own.
    """

    ids: Tensor
    role: Tensor
    turn: Tensor

    def cut(self, length: int) -> Chat:
        """Its first tokens."""
        return Chat(self.ids[:length], self.role[:length], self.turn[:length])


def read_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, template: bool = True) -> Chat:
    """Tokenise a conversation; a last assistant message is left open, so that the model would go on with it.

    Args:
        tokenizer: a fast one, because tokens are matched to messages by character. messages: in order.
        template: apply the chat template; False joins the contents by line breaks, after whatever the tokenizer puts first.

    Raises:
        ConfigError: no messages, an unknown role, or no chat template.
        DataError: the template rewrites a message, so that its tokens cannot be told.
        UnsupportedError: a slow tokenizer.
    """
    roles = {"user": USER, "assistant": ASSISTANT, "system": TEMPLATE}
    if not messages or any(m.get("role") not in roles or not isinstance(m.get("content"), str) for m in messages):
        raise ConfigError(
            f"messages is {messages!r}; expected dicts with role (user, assistant, system) and content (text)."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise UnsupportedError(
            f"{type(tokenizer).__name__} is a slow tokenizer and tells no characters; use the fast one."
        )
    if template and not getattr(tokenizer, "chat_template", None):
        raise ConfigError("template=True, but this tokenizer has no chat template; use template=False.")
    if template:
        ended = messages[-1]["role"] == "assistant"
        text = str(
            tokenizer.apply_chat_template(
                [dict(m) for m in messages],
                tokenize=False,
                add_generation_prompt=not ended,
                continue_final_message=ended,
            )
        )
    else:
        text = "\n".join(m["content"] for m in messages)
    spans, cursor = [], 0
    for turn, message in enumerate(messages):
        content = message["content"].strip()
        start = text.find(content, cursor)
        if start < 0:
            raise DataError(
                f"the chat template rewrites message {turn} ({content[:40]!r}); its tokens cannot be told apart."
            )
        cursor = start + len(content)
        spans.append((start, cursor, roles[message["role"]], turn))
    encoded = tokenizer(text, add_special_tokens=not template, return_offsets_mapping=True, verbose=False)
    found = [_owner(a, b, spans) for a, b in encoded["offset_mapping"]]
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    role = torch.tensor([r for r, _ in found])
    if len(ids) and ids[0] == tokenizer.bos_token_id:
        role[0] = BOS
    return Chat(ids, role, torch.tensor([t for _, t in found]))


def _owner(a: int, b: int, spans: Sequence[tuple[int, int, int, int]]) -> tuple[int, int]:
    """Role and turn of the message that holds more than half of the characters ``a … b``."""
    for start, end, role, turn in spans:
        if 2 * (min(b, end) - max(a, start)) > b - a:
            return role, turn
    return TEMPLATE, -1
