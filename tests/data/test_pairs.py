"""IOI and Colored Objects pairs: aligned, placed, seeded, and refused where there is nothing to patch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, DataError
from foveal.data import colored_objects, ioi
from foveal.data.pairs import Pair, align
from foveal.data.text import tokens

from .tokenizers import byte_tokenizer
from .words import TASK_WORDS, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(TASK_WORDS)


def word(tokenizer, ids) -> str:
    return tokenizer.convert_ids_to_tokens(int(ids)).strip()


@pytest.mark.parametrize("corruption", ioi.CORRUPTIONS)
def test_ioi_pairs_say_what_they_mean(tokenizer, corruption):
    pairs = ioi.build(tokenizer, 40, seed=3, corruption=corruption)
    orders = set()
    for b in range(40):
        at = {name: int(where[b, 0]) for name, where in pairs.places.items()}
        io, s1, s2 = (word(tokenizer, pairs.clean[b, at[p]]) for p in ("io", "s1", "s2"))
        assert s1 == s2 != io and at["s1+1"] == at["s1"] + 1 and at["s1"] < at["s2"] < at["end"]
        assert (word(tokenizer, pairs.correct[b]), word(tokenizer, pairs.foil[b])) == (io, s1)
        assert word(tokenizer, pairs.clean[b, at["end"]]) in ("to", "for")
        orders.add(at["io"] < at["s1"])
        changed = (pairs.clean[b] != pairs.corrupt[b]).nonzero()[:, 0].tolist()
        if corruption == "swap":
            assert changed == [at["s2"]] and word(tokenizer, pairs.corrupt[b, at["s2"]]) == io
        else:
            new = {word(tokenizer, pairs.corrupt[b, p]) for p in changed}
            assert changed == sorted([at["io"], at["s1"], at["s2"]]) and len(new) == 3 and not new & {io, s1}
    assert orders == {True, False}, "both ABBA and BABA"


def test_colored_objects_pairs_say_what_they_mean(tokenizer):
    pairs = colored_objects.build(tokenizer, 30, seed=1)
    asked = []
    for b in range(30):
        changed = (pairs.clean[b] != pairs.corrupt[b]).nonzero()[:, 0].tolist()
        assert changed == [int(pairs.places["asked"][b, 0])], "exactly the thing asked for"
        right, thing = int(pairs.places["right"][b, 0]), int(pairs.places["named"][b, 0])
        assert thing == right + 1 and pairs.clean[b, thing] == pairs.clean[b, changed[0]]
        assert word(tokenizer, pairs.correct[b]) == word(tokenizer, pairs.clean[b, right]).capitalize()
        other = (pairs.clean[b] == pairs.corrupt[b, changed[0]]).nonzero()[0, 0]
        assert word(tokenizer, pairs.foil[b]) == word(tokenizer, pairs.clean[b, other - 1]).capitalize()
        colors = {word(tokenizer, i) for i in pairs.clean[b, pairs.places["colors"][b]]}
        wrong = {word(tokenizer, i) for i in pairs.clean[b, pairs.places["wrong"][b]]}
        assert len(colors) == 3 and colors - wrong == {word(tokenizer, pairs.clean[b, right])}
        first = tokenizer.decode(pairs.clean[b, : int(pairs.places["colors"][b].min())])
        assert not any(f" {c} " in first for c in colors), "the solved question has other colours"
        asked.append(int((pairs.places["colors"][b] == right).nonzero()))
        assert {word(tokenizer, i).lower() for i in pairs.choices[b]} == colors
    assert sorted(asked) == [0] * 10 + [1] * 10 + [2] * 10


@pytest.mark.parametrize("build", [ioi.build, colored_objects.build])
def test_the_same_seed_gives_the_same_pairs(tokenizer, build):
    a, b, c = (build(tokenizer, 9, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.clean, b.clean) and torch.equal(a.corrupt, b.corrupt)
    assert a.clean.shape != c.clean.shape or not torch.equal(a.clean, c.clean)


def test_prompts_of_ones_own(tokenizer):
    text = "Then Mary and John met at the school, and John gave a book to"
    pairs = ioi.from_text(tokenizer, [text])
    assert word(tokenizer, pairs.corrupt[0, pairs.places["s2"][0, 0]]) == word(tokenizer, pairs.correct[0]) == "Mary"


@pytest.mark.parametrize(
    "text",
    ["The cat sat on the mat", "Then Mary and John met", "Mary saw Mary", "Then Mary and John met Anna and John to"],
)
def test_a_prompt_with_no_subject_to_patch_is_refused(tokenizer, text):
    with pytest.raises(DataError, match="no subject to patch"):
        ioi.from_text(tokenizer, [text])


def test_padding_repeats_the_last_token_and_end_is_the_last_real_one(tokenizer):
    pairs = ioi.build(tokenizer, 20)
    for b in range(20):
        end = int(pairs.places["end"][b, 0])
        assert (pairs.clean[b, end:] == pairs.clean[b, end]).all()
    first = int((pairs.clean != pairs.corrupt).any(0).int().argmax())
    assert pairs.place("all")[0].tolist() == list(range(first, pairs.clean.shape[1]))


def test_bad_input_is_one_clear_error(tokenizer):
    with pytest.raises(DataError, match="single tokens"):
        ioi.build(byte_tokenizer(), 3)
    with pytest.raises(DataError, match="single tokens"):
        colored_objects.build(byte_tokenizer(), 3)
    with pytest.raises(ConfigError, match="corruption is 'xyz'"):
        ioi.build(tokenizer, 3, corruption="xyz")
    with pytest.raises(ConfigError, match="count is 0"):
        colored_objects.build(tokenizer, 0)
    with pytest.raises(DataError, match="same positions"):
        align(tokenizer, "mine", [Pair("a book", "a book to", " a", " book", {}, [" a"])], {})
    with pytest.raises(DataError, match="2 tokens"):
        align(tokenizer, "mine", [Pair("a book", "a ring", " a book", " book", {}, [" a"])], {})
    with pytest.raises(ConfigError, match="no place 'S2'"):
        ioi.build(tokenizer, 2).place("S2")
    assert len(tokens(tokenizer, " Mary")) == 1
