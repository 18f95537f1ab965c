"""Needles in text, and grids of symbols."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, DataError
from foveal.data.grids import GridTask
from foveal.data.retrieval import NEEDLES, hide
from foveal.data.text import tokens
from foveal.lens.context import recall

from .tokenizers import byte_tokenizer

TEXT = "\n".join(f"This is sentence number {i} of the text." for i in range(200))


@pytest.mark.parametrize("needle", NEEDLES, ids=lambda n: n.keywords[0])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_needle_stands_between_sentences_at_its_depth(needle, depth):
    tokenizer = byte_tokenizer()
    prompt = hide(tokenizer, TEXT, needle, 900, depth)
    before, found, after = prompt.user.partition(needle.sentence)
    assert found and prompt.user.count(needle.sentence) == 1 and prompt.prefix == needle.begins
    assert before.strip() == "" or before.rstrip().endswith(".") or depth == 1
    assert abs(len(before) / (len(before) + len(after)) - depth) < 0.12
    assert abs(len(tokens(tokenizer, prompt.user)) - 900 - len(needle.question)) < 10
    assert recall(needle.keywords, needle.sentence) == 1
    assert recall(needle.keywords, needle.question + needle.begins) == 0, "the question does not give the answer away"


def test_bad_needles_are_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(ConfigError, match="depth is 2"):
        hide(tokenizer, TEXT, NEEDLES[0], 900, 2)
    with pytest.raises(ConfigError, match="length 20"):
        hide(tokenizer, TEXT, NEEDLES[0], 20, 0.5)
    with pytest.raises(DataError, match="expected"):
        hide(tokenizer, "Short. Text.", NEEDLES[0], 900, 0.5)


def test_grids_ask_for_the_symbol_of_a_cell():
    task = GridTask(5, 7)
    grids = task.draw(50, torch.Generator().manual_seed(0))
    cell = grids.ids[:, -1] - task.symbols
    assert (cell >= 0).all() and (cell < 5).all() and (grids.ids[:, :-1] < 7).all()
    assert torch.equal(grids.ids.gather(1, cell[:, None])[:, 0], grids.answer) and task.vocab_size == 13
    assert torch.equal(grids.ids, task.draw(50, torch.Generator().manual_seed(0)).ids)
