"""Conditional instruction tuning: a token that says "obey the context", learned on turns that depend on it (arXiv 2411.02688).

A seed model scores how much every response looks at the user's text (``foveal.lens.context``); turns above β get the token behind their user
text; tuning is otherwise ordinary. At inference the token is added where the context must be obeyed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError
from ..data.chat import Message, read_chat
from ..lens.context import BETA, context_scores, marked
from .fit import fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDICATOR = "[IND]"
Conversation = Sequence[Message]


@torch.no_grad()
def add_indicator(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str = INDICATOR) -> int:
    """Make ``token`` one item of the vocabulary; its input and output rows are the means of the others. Returns its id.

    Logits of the old vocabulary stay as they were for text without the token.

    Raises:
        ConfigError: the tokenizer knows the token already, or does not read it as one.
    """
    if token in tokenizer.get_vocab():
        raise ConfigError(
            f"the tokenizer knows {token!r} already; a model gets its indicator once. Choose another token."
        )
    old = len(tokenizer)
    tokenizer.add_tokens([token], special_tokens=True)
    found = tokenizer(f"a {token}", add_special_tokens=False)["input_ids"]
    number = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(number, int)
    if found[-1] != number or found.count(number) != 1:
        raise ConfigError(
            f"the tokenizer reads {token!r} as {found}; expected one id of its own. Choose another token."
        )
    rows: Any = model.get_input_embeddings().weight
    if number >= rows.shape[0]:
        model.resize_token_embeddings(number + 1, mean_resizing=False)
    for side in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: Any = getattr(side, "weight", None)
        if weight is not None:
            weight[number] = weight[:old].float().mean(0).to(weight.dtype)
        bias: Any = getattr(side, "bias", None)
        if bias is not None:
            bias[number] = bias[:old].mean()
    return number


def asked(messages: Conversation, token: str = INDICATOR) -> list[dict[str, str]]:
    """The conversation with the indicator behind its last user turn: how a tuned model is told to obey the context.

    Raises:
        ConfigError: no user turn.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not turns:
        raise ConfigError("messages holds no user turn, behind which the indicator could stand.")
    return marked(messages, {turns[-1] + 1: math.inf}, token=token)


@dataclass(frozen=True)
class Marks:
    """Conversations with the indicator behind the user turns whose responses depend on them.

    Attributes:
        conversations: marked copies. scores: per conversation, turn of the response → its score.
        share: of the responses with a score, those that were marked.
    """

    conversations: tuple[list[dict[str, str]], ...]
    scores: tuple[dict[int, float], ...]
    share: float


def mark(
    seed_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], *, layer: int | None = None,
    beta: float = BETA, variant: str = "code", token: str = INDICATOR, progress: Callable[[int, int], None] | None = None,
) -> Marks:  # fmt: skip
    """Score every response with a seed model and mark the user turns before those above ``beta``; one forward per conversation.

    Args:
        seed_model: a tuned chat model of any size. layer, variant: see :func:`foveal.lens.context.context_scores`.
        beta: 0.6 in the paper. progress: called with (conversations scored, of all).

    Raises:
        ConfigError: no conversation, beta outside 0 to 1, no such layer. DataError: the template rewrites a message.
    """
    if not conversations or not 0 <= beta <= 1:
        raise ConfigError(f"received {len(conversations)} conversations and beta {beta}; expected at least one, and 0 to 1.")  # fmt: skip
    scores = []
    for number, conversation in enumerate(conversations):
        scores.append(context_scores(seed_model, read_chat(tokenizer, conversation), layer, variant=variant))
        if progress is not None:
            progress(number + 1, len(conversations))
    return _marks(conversations, scores, beta, token)


def shuffled_marks(marks: Marks, conversations: Sequence[Conversation], *, beta: float = BETA, seed: int = 0, token: str = INDICATOR) -> Marks:  # fmt: skip
    """As many marks as ``marks`` has, behind random turns: the control that credits the score, which the paper lacks."""
    where = [(c, turn) for c, found in enumerate(marks.scores) for turn in found]
    order = torch.randperm(len(where), generator=torch.Generator().manual_seed(seed)).tolist()
    scores: list[dict[int, float]] = [{} for _ in conversations]
    for (c, turn), other in zip(where, order, strict=True):
        from_, at = where[other]
        scores[c][turn] = marks.scores[from_][at]
    return _marks(conversations, scores, beta, token)


def _marks(conversations: Sequence[Conversation], scores: Sequence[dict[int, float]], beta: float, token: str) -> Marks:
    made = tuple(marked(c, found, beta=beta, token=token) for c, found in zip(conversations, scores, strict=True))
    known = [s for found in scores for s in found.values() if not math.isnan(s)]
    return Marks(made, tuple(scores), sum(s > beta for s in known) / len(known) if known else math.nan)


@dataclass(frozen=True)
class SFTOptions:
    """Settings of :func:`conditional_sft`; ``length`` cuts conversations, in tokens. The paper's lr and batch are for 1 to 8 billion weights."""

    steps: int = 500
    batch: int = 16
    length: int = 2048
    lr: float = 2e-5
    warmup: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or self.length < 2 or not 0 <= self.warmup <= 1:
            raise ConfigError(f"{self}: expected steps and batch of at least 1, length of at least 2, warmup 0 to 1.")


def conditional_sft(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], options: SFTOptions, *,
    checkpoint: Path | None = None, progress: Callable[[int, int, float], None] | None = None,
) -> list[float]:  # fmt: skip
    """Tune all weights on whole conversations, in place; the indicator's row is trained with them. Returns the losses.

    The loss covers every token, as in the authors' recipe. Give conversations of :func:`mark`, or plain ones for the baseline: batches
    depend on the seed alone, so both see the same turns in the same order.

    Args:
        checkpoint: file from which an interrupted run goes on. progress: called with (step, steps, loss).

    Raises:
        ConfigError: no conversation, or no chat template. DataError: one of fewer than two tokens, or a loss that is not finite.
    """
    if not conversations or not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"received {len(conversations)} conversations and a tokenizer {'with' if getattr(tokenizer, 'chat_template', None) else 'without'} a chat template; expected both.")  # fmt: skip
    texts = [_ids(tokenizer, c)[: options.length] for c in conversations]
    short = next((i for i, ids in enumerate(texts) if len(ids) < 2), None)
    if short is not None:
        raise DataError(f"conversation {short} has {len(texts[short])} tokens; expected at least 2.")

    def loss_of(step: int, g: torch.Generator) -> Tensor:
        chosen = [texts[i] for i in torch.randint(len(texts), (options.batch,), generator=g).tolist()]
        longest = max(map(len, chosen))
        ids, mask = torch.zeros(2, len(chosen), longest, dtype=torch.long)
        for row, text in enumerate(chosen):
            ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        wanted = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())

    return fit(
        model, loss_of, options.steps, lr=options.lr, warmup=round(options.warmup * options.steps), seed=options.seed,
        checkpoint=checkpoint, told={"recipe": "conditional_sft", **asdict(options)} if checkpoint else None, progress=progress,
    )  # fmt: skip


def _ids(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> list[int]:
    """Tokens of a whole conversation in the chat template, its end included."""
    text = str(tokenizer.apply_chat_template([dict(m) for m in conversation], tokenize=False))
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
