"""A tokenizer whose tokens are whole words with the space before them, and single signs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from foveal.data import colored_objects, ioi

TASK_WORDS = [
    *ioi.NAMES, *ioi.PLACES, *ioi.OBJECTS, *ioi.TEMPLATES, *colored_objects.COLORS, *(c.capitalize() for c in colored_objects.COLORS),
    *colored_objects.THINGS, *colored_objects.WHERE, *colored_objects.SEEN, "Q: On the a an and. What color is the pen?\nA: a, b",
]  # fmt: skip
"""What the prompts of the circuits' tasks are made of."""


def word_tokenizer(texts: Iterable[str], bos: bool = False) -> PreTrainedTokenizerFast:
    """Knows the pieces of ``texts`` and those pieces with a space before; everything else is ``<unk>``. ``bos`` puts ``<s>`` first."""
    pieces = dict.fromkeys(piece for text in texts for piece in re.findall(r" ?\w+|[^\w]", text))
    vocab = {"<unk>": 0, "<pad>": 1, **({"<s>": 2} if bos else {})}
    for piece in pieces:
        for form in (piece, f" {piece.strip()}" if piece.strip() else piece):
            vocab.setdefault(form, len(vocab))
    inner = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    more = {"bos_token": "<s>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", **more)
