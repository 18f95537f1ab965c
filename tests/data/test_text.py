"""Text to measure on: the default, files and their refusals, tokens, and disjoint spans."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="needs the package transformers")

from foveal.core.errors import ConfigError, DataError
from foveal.data.text import load_text, need, prefix, split, text_name, tokens

from .tokenizers import byte_tokenizer


def test_default_is_the_whole_language_reference() -> None:
    text = load_text()
    assert len(text) > 400_000
    assert text.startswith(topics[min(topics)]) and text.endswith(topics[max(topics)])
    assert len(text) == sum(map(len, topics.values())) + 2 * (len(topics) - 1)
    assert text == load_text(None)
    assert text_name().startswith("pydoc_data.topics of CPython 3.")


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "täxt.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "naïve – text\n".encode())
    assert load_text(path) == load_text(str(path)) == "naïve – text\n"
    assert text_name(path) == "täxt.txt"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"caf\xe9", r"not UTF-8 text \(byte 3 is 0xe9\)"),
        (b"GGUF\0\0\0\3", r"is binary \(it has a zero byte at 4\)"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_text(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        load_text(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="cannot be read"):
        load_text(tmp_path)


def test_tokens_and_prefix() -> None:
    plain, with_bos = byte_tokenizer(), byte_tokenizer(bos=True)
    for tokenizer in (plain, with_bos):
        ids = tokens(tokenizer, "hello there")
        assert ids.dtype == torch.int64 and ids.shape == (11,)
        assert tokenizer.decode(ids) == "hello there"
    assert prefix(plain).tolist() == []
    assert prefix(with_bos).tolist() == [0]


def test_need() -> None:
    need(torch.arange(10), 10)
    with pytest.raises(DataError, match=r"text has 9 tokens; expected at least 10 \(two spans\); pass a longer --text"):
        need(torch.arange(9), 10, "two spans")


@given(
    count=st.integers(1, 400),
    length=st.integers(2, 60),
    search=st.integers(0, 4),
    held_out=st.integers(0, 4),
    ahead=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_spans_are_disjoint_pieces_of_the_text(
    count: int, length: int, search: int, held_out: int, ahead: int, seed: int
) -> None:
    ids = torch.arange(1000, 1000 + count)
    first = torch.full((ahead,), 7)
    if search + held_out == 0:
        with pytest.raises(ConfigError):
            split(ids, length, search=search, held_out=held_out, seed=seed, ahead=first)
        return
    if (search + held_out) * (length - ahead) > count:
        with pytest.raises(DataError, match=f"text has {count} tokens; expected at least"):
            split(ids, length, search=search, held_out=held_out, seed=seed, ahead=first)
        return
    spans = split(ids, length, search=search, held_out=held_out, seed=seed, ahead=first)
    assert spans.search.shape == (search, length) and spans.held_out.shape == (held_out, length)
    both = torch.cat([spans.search, spans.held_out])
    assert (both[:, :ahead] == 7).all()
    body = both[:, ahead:]
    assert body.unique().numel() == body.numel()
    assert (body.diff(dim=1) == 1).all()
    assert (body[:, 0] - 1000).tolist() == list(spans.starts)
    again = split(ids, length, search=search, held_out=held_out, seed=seed, ahead=first)
    assert torch.equal(again.held_out, spans.held_out) and torch.equal(again.search, spans.search)


def test_seed_moves_the_spans_and_search_does_not_move_the_held_out_ones() -> None:
    ids = torch.arange(10_000)
    starts = {split(ids, 100, seed=seed).starts for seed in range(20)}
    assert len(starts) == 20
    few, many = split(ids, 100, search=1, held_out=3, seed=5), split(ids, 100, search=9, held_out=3, seed=5)
    assert torch.equal(few.held_out, many.held_out)


def test_split_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    split(torch.arange(1000), 10, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_span_without_room_for_text() -> None:
    with pytest.raises(ConfigError, match="length=1"):
        split(torch.arange(100), 1, ahead=torch.tensor([0]))
