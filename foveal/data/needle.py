"""Needle in a haystack: can a model still find a sentence that lies far back?

Invented facts ("The secret code of Lisbon is 48213.") are put between the sentences of a long text, one at each
requested depth; then each is asked for. All needles lie in one context, so that one prefill serves all questions; each
is of another kind, because small models mix up facts of one kind even with dense attention. Scoring is exact: greedy
decoding must give the answer's tokens. Chance is 1 in 90,000.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError
from .text import prefix, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SUBJECTS = (
    ("the secret code of", ("Lisbon", "Oslo", "Cairo", "Lima", "Kyoto", "Dublin", "Nairobi", "Vienna")),
    ("the phone number of", ("Maria", "Robert", "Elena", "Samuel", "Clara", "Victor", "Irene", "Oscar")),
    ("the price of the golden", ("lamp", "piano", "clock", "mirror", "carpet", "crown", "violin", "vase")),
    (
        "the serial number of the",
        ("red engine", "blue truck", "old boat", "white drone", "green tractor", "black crane"),
    ),
    ("the population of the village", ("Ardley", "Morvale", "Tinsbury", "Kelmore", "Hapford", "Wexham")),
    ("the weight of the stone", ("statue", "bridge", "tower", "lion", "fountain", "arch")),
    ("the height of the", ("northern peak", "eastern ridge", "silver cliff", "grey volcano", "western summit")),
    ("the ticket number of the", ("first passenger", "last visitor", "young pilot", "lost tourist", "early guest")),
)
"""What needles are about: a kind, and its members. No two needles of one context share a kind."""

_HAY = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class Question:
    """One needle's question.

    Attributes:
        ids: ``(Q,)`` tokens that follow the context.
        answer: ``(A,)`` tokens that greedy decoding must give next.
        depth: the needle's place in the context: 0 is its beginning, 1 its end.
        position: index in the context of the needle's first token.
    """

    ids: Tensor
    answer: Tensor
    depth: float
    position: int


@dataclass(frozen=True, eq=False)
class Needles:
    """A context that holds the needles, ``(N,)`` tokens, and their questions in the order of the depths."""

    context: Tensor
    questions: tuple[Question, ...]


def build(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Tensor,
    length: int,
    *,
    depths: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
    chat: bool = False,
) -> Needles:
    """Hide one needle per depth in the haystack and make the questions.

    Args:
        tokenizer: the model's.
        haystack: ``(N,)`` token ids of ordinary text; the first ones are used.
        length: tokens of the context together with the longest question and its answer; never exceeded.
        depths: from 0 (beginning) to 1 (end); each needle goes to the nearest end of a sentence.
        seed: chooses subjects and codes.
        chat: False: a new paragraph of the text begins the needle's sentence again, which every language model can
            complete; True: ask in the tokenizer's chat template, the answer's sentence begun.

    Raises:
        ConfigError: a depth out of range, more depths than kinds, a ``length`` too short, no chat template.
        DataError: the haystack is too short.
    """
    if not depths or len(depths) > len(SUBJECTS) or not all(0 <= d <= 1 for d in depths):
        raise ConfigError(f"depths is {tuple(depths)!r}; expected 1 to {len(SUBJECTS)} numbers from 0 to 1.")
    g = torch.Generator().manual_seed(seed)
    kinds = [SUBJECTS[i] for i in torch.randperm(len(SUBJECTS), generator=g)[: len(depths)].tolist()]
    subjects = [f"{kind} {of[int(torch.randint(len(of), (), generator=g))]}" for kind, of in kinds]
    codes = (torch.randperm(90_000, generator=g)[: len(depths)] + 10_000).tolist()
    before, rendered = frame(tokenizer, [(f"What is {x}?", f"{_capital(x)} is") for x in subjects], chat)
    needles = [tokens(tokenizer, f" {_capital(x)} is {code}.") for x, code in zip(subjects, codes, strict=True)]
    asked = [question(tokenizer, text, (str(code),)) for text, code in zip(rendered, codes, strict=True)]
    after = max(len(q) + len(a) for q, (a,) in asked)
    hay = length - len(before) - after - sum(map(len, needles))
    if hay < 16 * len(depths):
        raise ConfigError(
            f"a context of {length} tokens leaves {hay} for text beside {len(depths)} needles and a question; "
            f"expected at least {16 * len(depths)}: use a longer context or fewer depths."
        )
    if len(haystack) < hay:
        raise DataError(
            f"the haystack has {len(haystack)} tokens; expected at least {hay} for a context of {length}; "
            "pass a longer --text or a smaller --context."
        )
    planted, found = plant(tokenizer, haystack[:hay].cpu(), needles, depths)
    questions = tuple(
        Question(ids, answer, float(depth), len(before) + at)
        for (ids, (answer,)), depth, at in zip(asked, depths, found, strict=True)
    )
    return Needles(torch.cat([before, planted]), questions)


def plant(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, pieces: Sequence[Tensor], depths: Sequence[float]
) -> tuple[Tensor, list[int]]:
    """Put pieces between the sentences of a text.

    Args:
        text: ``(N,)`` tokens. pieces: token ids of sentences that begin with a space. depths: where each goes, 0 (beginning) to 1
            (end): to the nearest end of a sentence. Pieces with the same place keep their order.

    Returns:
        The text with the pieces, and the index of each piece's first token in it.
    """
    ends = _sentence_ends(tokenizer, text)
    parts, at, position, found = [], 0, 0, [0] * len(pieces)
    for i in sorted(range(len(pieces)), key=lambda i: depths[i]):
        end = int(ends[(ends - depths[i] * len(text)).abs().argmin()])
        parts += [text[at:end], pieces[i]]
        found[i] = position + end - at
        position, at = found[i] + len(pieces[i]), end
    return torch.cat([*parts, text[at:]]), found


def score(needles: Needles, decode: Callable[[Question, int], Tensor]) -> tuple[bool, ...]:
    """For each question, whether it is answered exactly.

    Args:
        needles: from :func:`build`.
        decode: ``(question, n) → (n,)`` tokens decoded greedily after ``context`` and ``question.ids``; fewer when the
            model stops early.
    """
    hits = []
    for question in needles.questions:
        got = decode(question, len(question.answer)).reshape(-1).cpu()
        hits.append(torch.equal(got.to(torch.int64), question.answer))
    return tuple(hits)


@torch.inference_mode()
def retrieve(model: PreTrainedModel, needles: Needles, cache: Any = None) -> tuple[bool, ...]:
    """Score a model with one prefill of the context; each question continues from it through cached decoding.

    Args:
        model: a causal language model, with or without a policy attached.
        needles: from :func:`build`.
        cache: a cache that holds the context already, if the caller has prefilled it; cropped back after each question.
    """
    device = next(model.parameters()).device
    held = len(needles.context)
    if cache is None:
        cache = model(input_ids=needles.context[None].to(device), use_cache=True, logits_to_keep=1).past_key_values

    def decode(question: Question, count: int) -> Tensor:
        ids, out = question.ids[None].to(device), []
        for _ in range(count):
            logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
            out.append(ids[0])
        cache.crop(held - cache.get_seq_length())
        return torch.cat(out)

    return score(needles, decode)


def frame(tokenizer: PreTrainedTokenizerBase, asked: Sequence[tuple[str, str]], chat: bool) -> tuple[Tensor, list[str]]:
    """What stands before a context (ids), and for each ``(question, begun)`` the text after it, up to where the answer begins.

    Without ``chat`` that is a new paragraph with ``begun``; in the chat template it is the question and the begun reply.

    Raises:
        ConfigError: there is no chat template, or it rewrites messages.
    """
    if not chat:
        return prefix(tokenizer), [f"\n\n{begun}" for _, begun in asked]
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("chat=True, but this tokenizer has no chat template; use chat=False.")
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{_HAY}\n\n{q}"}], tokenize=False, add_generation_prompt=True
        )
        for q, _ in asked
    ]
    head, marker, _ = str(texts[0]).partition(_HAY)
    if not marker:
        raise ConfigError("the chat template drops or rewrites the user's message; use chat=False.")
    after = [f"{str(text).partition(_HAY)[2]}{begun}" for text, (_, begun) in zip(texts, asked, strict=True)]
    return tokens(tokenizer, head), after


def question(
    tokenizer: PreTrainedTokenizerBase, text: str, answers: Sequence[str]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Token ids of the question and of each answer after it; the question's are a prefix of itself with any of the answers."""
    ids = tokens(tokenizer, text)
    whole = [tokens(tokenizer, f"{text} {answer}") for answer in answers]
    shared = 0
    while shared < len(ids) and all(ids[shared] == w[shared] for w in whole):
        shared += 1
    return ids[:shared], tuple(w[shared:] for w in whole)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _sentence_ends(tokenizer: PreTrainedTokenizerBase, text: Tensor) -> Tensor:
    """Indices after which a sentence ends, ``(E,)``: a full stop and then white space; in text without any, 0."""
    spelt = {i: str(tokenizer.decode([i])) for i in text.unique().tolist()}
    stop = torch.tensor([i for i, t in spelt.items() if t.endswith((".", "!", "?"))], dtype=text.dtype)
    space = torch.tensor([i for i, t in spelt.items() if t[:1].isspace()], dtype=text.dtype)
    ends = (torch.isin(text[:-1], stop) & torch.isin(text[1:], space)).nonzero()[:, 0] + 1
    return ends if len(ends) else torch.zeros(1, dtype=torch.int64)
