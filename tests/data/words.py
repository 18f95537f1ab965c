"""A tokenizer whose tokens are whole words with the space before them, and single signs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Knows the pieces of ``texts`` and those pieces with a space before; everything else is ``<unk>``."""
    pieces = dict.fromkeys(piece for text in texts for piece in re.findall(r" ?\w+|[^\w]", text))
    vocab = {"<unk>": 0, "<pad>": 1}
    for piece in pieces:
        for form in (piece, f" {piece.strip()}" if piece.strip() else piece):
            vocab.setdefault(form, len(vocab))
    inner = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w]"), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
