"""How much a model looks at the user's text: attention by role, the effect of a chat template, and context-dependency scores.

After arXiv 2411.02688. Mass on a role is attention whose V is the role's indicator: O(N) memory, any kernel, any length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError
from ..data.chat import ASSISTANT, BOS, ROLES, TEMPLATE, USER, Chat, Message, read_chat
from .exact import MIN_COLUMNS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..hf import AttentionEvent

BETA = 0.6
"""A turn depends on its context when its score is above this (the paper's; the released recipe has 0.8)."""

LIMIT = 2047
"""Tokens of a conversation that are scored."""

VARIANTS = ("code", "paper")


def middle_layer(num_layers: int) -> int:
    """The paper's layer 15 of 22, in proportion."""
    return 15 * num_layers // 22


@torch.no_grad()
def group_mass(
    model: nn.Module, ids: Tensor, group: Tensor, count: int, *, attention_mask: Tensor | None = None, layers: Sequence[int] | None = None
) -> dict[int, Tensor]:  # fmt: skip
    """Attention mass of every row on groups of keys, exactly, without N×N weights.

    Args:
        model: any decoder that :func:`foveal.attach` takes. ids: ``(B, N)`` tokens.
        group: ``(B, N)`` number of each key's group, below ``count``; others belong to none. count: at most 16.
        attention_mask: ``(B, N)``, 0 on padding. layers: default all.

    Returns:
        Layer → ``(B, H, N, count)`` float32. The groups of a row sum to 1 where they cover all keys and there is no learned sink.

    Raises:
        ShapeError: groups of another shape. ConfigError: more groups than 16, or a layer that the model lacks.
    """
    from ..hf import attach
    from ..kernels.dispatch import compute
    from ..patterns import Dense

    if group.shape != ids.shape or ids.dim() != 2:
        raise ShapeError(f"group has shape {tuple(group.shape)} and ids {tuple(ids.shape)}; expected the same (B, N).")
    if not 1 <= count <= MIN_COLUMNS:
        raise ConfigError(f"count is {count}; expected 1 to {MIN_COLUMNS} groups.")
    found: dict[int, Tensor] = {}

    def measure(event: AttentionEvent) -> None:
        if layers is not None and event.layer_index not in layers:
            return
        call = event.call
        columns = (
            (group[:, :, None] == torch.arange(MIN_COLUMNS))
            .to(call.k)
            .masked_fill(torch.arange(MIN_COLUMNS) >= count, 0)
        )
        v = columns[:, None].expand(-1, call.k.shape[1], -1, -1).contiguous()
        out, _ = compute(call.replace(v=v, layout=None, return_lse=False), "auto", event.sink_logits)
        found[event.layer_index] = out[..., :count].float()

    kwargs: dict[str, Any] = {} if attention_mask is None else {"attention_mask": attention_mask}
    body = getattr(model, "base_model", model)
    with attach(model, Dense(), probes=[measure]) as handle:
        for layer in layers or ():
            if not 0 <= layer < handle.num_layers:
                raise ConfigError(
                    f"there is no layer {layer}; {type(model).__name__} has layers 0 to {handle.num_layers - 1}."
                )
        body(input_ids=ids, use_cache=False, **kwargs)
    return found


@dataclass(frozen=True)
class Allocation:
    """Where one head's row puts its mass; the four add up to 1."""

    layer: int
    head: int
    user: float
    assistant: float
    template: float
    bos: float

    def without_template(self) -> Allocation:
        """The template's share dropped and the others made to sum to 1, as the paper compares (this inflates BOS)."""
        rest = self.user + self.assistant + self.bos
        scale = 1 / rest if rest else math.nan
        return Allocation(self.layer, self.head, self.user * scale, self.assistant * scale, 0.0, self.bos * scale)


def allocation(model: nn.Module, chat: Chat, layer: int | None = None, head: int | None = None) -> Allocation:
    """Mass of the last token's row by role.

    Args:
        model: a decoder. chat: from :func:`foveal.data.chat.read_chat`. layer: default :func:`middle_layer`.
        head: default the retrieval head, the one with the most mass on the user.

    Raises:
        ConfigError: no such layer or head.
    """
    layer = _layer(model, layer)
    mass = group_mass(model, chat.ids[None], chat.role[None], len(ROLES), layers=[layer])[layer][0, :, -1]
    if head is not None and not 0 <= head < mass.shape[0]:
        raise ConfigError(f"there is no head {head}; expected 0 to {mass.shape[0] - 1}.")
    chosen = int(mass[:, USER].argmax()) if head is None else head
    return Allocation(layer, chosen, *(float(mass[chosen, role]) for role in (USER, ASSISTANT, TEMPLATE, BOS)))


@dataclass(frozen=True)
class TemplateShift:
    """The same head with and without the chat template; ``ratio`` is user mass with / without, the template's share dropped."""

    plain: Allocation
    templated: Allocation

    @property
    def ratio(self) -> float:
        """Below 1: the template takes attention from the user's text."""
        before = self.plain.without_template().user
        return self.templated.without_template().user / before if before else math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = {"plain": self.plain, "templated": self.templated}
        out: dict[str, Any] = {n: {role: getattr(a, role) for role in ROLES} for n, a in rows.items()}
        return {
            **out,
            "layer": self.plain.layer,
            "head": self.plain.head,
            "ratio": None if math.isnan(self.ratio) else self.ratio,
        }


def template_shift(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], layer: int | None = None
) -> TemplateShift:
    """User mass before and after the chat template, at the last token of a response prefix.

    The retrieval head is chosen on the run without template and reused for the run with it. The first token counts as BOS in both runs,
    whatever it is: it holds the attention sink, and without a BOS token the sink would count as the user's text in the plain run alone.

    Args:
        messages: the last one is the assistant's response prefix, whose last token is the row that is measured.

    Raises:
        ConfigError: the last message is not the assistant's, or no template. DataError: the template rewrites a message.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise ConfigError(
            "the last message must be the assistant's response prefix, so that both runs end in the same token."
        )
    chats = [read_chat(tokenizer, messages, template=template) for template in (False, True)]
    for chat in chats:
        chat.role[0] = BOS
    plain = allocation(model, chats[0], layer)
    return TemplateShift(plain, allocation(model, chats[1], plain.layer, plain.head))


def context_scores(
    model: nn.Module, chat: Chat, layer: int | None = None, *, variant: str = "code", limit: int = LIMIT
) -> dict[int, float]:
    """How much each response depends on the user's text: ``s = mean over its tokens of attention on the user so far``.

    Args:
        model: the seed model. chat: user and assistant turns. layer: default :func:`middle_layer`.
        variant: ``"code"`` takes the best head for every token, ``"paper"`` one head per response, that with the highest mean;
            the former is never below the latter.
        limit: tokens that are looked at; the rest is cut off.

    Returns:
        Turn → score in [0, 1]; NaN for a response of which no token is left, which no threshold calls dependent.

    Raises:
        ConfigError: another variant, or no such layer.
    """
    if variant not in VARIANTS:
        raise ConfigError(f"variant is {variant!r}; expected one of {', '.join(VARIANTS)}.")
    turns = sorted(set(chat.turn[chat.role == ASSISTANT].tolist()))
    chat, layer = chat.cut(limit), _layer(model, layer)
    user = torch.where(chat.role == USER, 0, -1)
    mass = group_mass(model, chat.ids[None], user[None], 1, layers=[layer])[layer][0, :, :, 0]  # (H, N)
    return {turn: score_of(mass[:, (chat.turn == turn) & (chat.role == ASSISTANT)], variant) for turn in turns}


def score_of(mass: Tensor, variant: str) -> float:
    """Score from ``(H, tokens)`` user mass of a response's rows."""
    if mass.shape[1] == 0:
        return math.nan
    return float(mass.amax(0).mean() if variant == "code" else mass.mean(1).amax())


def marked(
    messages: Sequence[Message], scores: dict[int, float], *, beta: float = BETA, token: str = "[IND]"
) -> list[dict[str, str]]:
    """The conversation with ``token`` appended to every user turn whose response scores above ``beta``."""
    out = [dict(message) for message in messages]
    for turn, score in scores.items():
        if score > beta and turn > 0 and out[turn - 1]["role"] == "user":
            out[turn - 1]["content"] += f" {token}"
    return out


def recall(keywords: Sequence[str], text: str) -> float:
    """Share of the key words that occur in ``text`` as whole words, case and punctuation aside (the needle metric that the paper reports)."""
    if not keywords:
        raise ConfigError("keywords is empty; expected the words that an answer must hold.")
    words = set(re.sub(r"[^\w\s]", "", text.lower()).split())
    return sum(re.sub(r"[^\w\s]", "", word.lower()) in words for word in keywords) / len(keywords)


def _layer(model: nn.Module, layer: int | None) -> int:
    from ..hf.families import depth, sites

    return middle_layer(depth(model, sites(model))) if layer is None else layer
