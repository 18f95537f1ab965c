"""Text to measure on: the embedded default or a file, as tokens, cut into disjoint spans for search and for evaluation."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.errors import ConfigError, DataError

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedTokenizerBase


def load_text(path: str | os.PathLike[str] | None = None) -> str:
    """The text of a file, or by default the English prose that every CPython carries.

    Args:
        path: a UTF-8 text file; None for the Python language reference in ``pydoc_data.topics`` (about 465,000
            characters), its topics joined in the order of their names.

    Raises:
        DataError: the file is missing, empty, or not text.
    """
    if path is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"text file {file} does not exist; give a UTF-8 text file, or none for the default.") from None
    except OSError as error:
        raise DataError(f"text file {file} cannot be read: {error.strerror or error}.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"text file {file} is not UTF-8 text (byte {error.start} is 0x{content[error.start]:02x}); "
            "convert it, for example with iconv -t utf-8."
        ) from None
    if "\0" in text:
        raise DataError(f"text file {file} is binary (it has a zero byte at {content.index(0)}); expected UTF-8 text.")
    if not text.strip():
        raise DataError(f"text file {file} is empty; expected text.")
    return text


def text_name(path: str | os.PathLike[str] | None = None) -> str:
    """How reports name the text: the file's own name, or the default's with the Python version that it depends on."""
    return Path(path).name if path is not None else f"pydoc_data.topics of CPython {platform.python_version()}"


def tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """All tokens of ``text``, ``(N,)`` int64, without special tokens (see :func:`prefix`)."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def prefix(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The tokens that this tokenizer puts before a text, such as BOS; ``(P,)`` int64, often empty.

    Models that were trained with a first token of this kind degrade without it: put it before every span.
    """
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    ahead = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return torch.tensor(full[:ahead], dtype=torch.int64)


def need(ids: Tensor, count: int, why: str = "") -> None:
    """Raise :class:`DataError` unless there are at least ``count`` tokens; ``why`` explains the count."""
    if len(ids) < count:
        reason = f" ({why})" if why else ""
        raise DataError(
            f"the text has {len(ids)} tokens; expected at least {count}{reason}; "
            "pass a longer --text or a smaller --context."
        )


@dataclass(frozen=True, eq=False)
class Spans:
    """Disjoint pieces of one text.

    Attributes:
        search: ``(S, length)`` token ids for calibration and search.
        held_out: ``(E, length)`` token ids that the search never sees.
        starts: the index in the text of each piece's first token of text, those of ``search`` first.
    """

    search: Tensor
    held_out: Tensor
    starts: tuple[int, ...]


def split(
    ids: Tensor, length: int, *, search: int = 1, held_out: int = 1, seed: int = 0, ahead: Tensor | None = None
) -> Spans:
    """Cut a text into disjoint spans for search and for held-out evaluation.

    The text is cut into consecutive pieces from a random offset, and the pieces are dealt out in random order; both
    depend on ``seed`` alone. Held-out pieces are dealt first, so that they stay the same when ``search`` changes.

    Args:
        ids: ``(N,)`` token ids of the whole text.
        length: tokens per span, ``ahead`` included.
        search, held_out: number of spans of each kind.
        seed: of a local generator.
        ahead: ``(P,)`` tokens put before every span, from :func:`prefix`.

    Raises:
        DataError: the text is too short.
        ConfigError: a count or length is out of range.
    """
    ahead = ids[:0] if ahead is None else ahead.to(ids)
    body = length - len(ahead)
    if body < 1 or search < 0 or held_out < 0 or search + held_out < 1:
        raise ConfigError(
            f"split has length={length}, search={search}, held_out={held_out}; expected at least one span of more than "
            f"{len(ahead)} tokens."
        )
    count = search + held_out
    need(ids, count * body, f"{count} disjoint spans of {body}")
    g = torch.Generator().manual_seed(seed)
    pieces = len(ids) // body
    offset = int(torch.randint(len(ids) - pieces * body + 1, (), generator=g))
    order = torch.randperm(pieces, generator=g)[:count].tolist()
    starts = [offset + piece * body for piece in order[held_out:] + order[:held_out]]
    spans = torch.stack([torch.cat([ahead, ids[s : s + body]]) for s in starts])
    return Spans(spans[:search], spans[search:], tuple(starts))
