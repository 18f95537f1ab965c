"""Tasks: what their items say, that they fit their length, and what models of known ability score."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="needs the package transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from foveal.core.errors import ConfigError, DataError
from foveal.data.text import load_text, prefix, tokens
from foveal.evals.base import Material, Passage, Quiz, Task, task, tasks
from foveal.evals.reader import Reader
from foveal.evals.scores import passage_figures, quiz_figures

from ..data.tokenizers import byte_tokenizer
from .oracles import Copier, Knower, Oracle

ASKING = ("needle", "multikey", "tracking", "copy")
VOCABULARY = 258


def material(
    context: int = 1500, chat: bool = False, trials: int = 1, seed: int = 0, characters: int = 20_000
) -> Material:
    tokenizer = byte_tokenizer(bos=True, chat=chat)
    ids = tokens(tokenizer, load_text()[5000 : 5000 + characters])
    return Material(tokenizer, ids, prefix(tokenizer), context, trials, seed, chat)


def figures(model: Any, one: Task, items: list[Any]) -> dict[str, Any]:
    reader = Reader(model)
    assert one.axes is not None
    return quiz_figures([reader.quiz(item, None, "it") for item in items], one.axes, seed=0)


def test_tasks_are_found_in_order_and_say_what_they_are() -> None:
    assert list(tasks()) == ["perplexity", "kl", *ASKING]
    for cls in tasks().values():
        assert cls.title and cls.about.endswith(".") and (cls.axes is None) == bool(cls.measure)
    with pytest.raises(ConfigError, match=r"unknown task 'nedle'\. Did you mean 'needle'"):
        task("nedle")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ASKING)
def test_context_question_and_answers_fill_the_length_and_never_exceed_it(name: str, chat: bool) -> None:
    made = task(name).items(material(chat=chat))
    for quiz in made:
        assert isinstance(quiz, Quiz) and quiz.key.startswith(f"{name}.")
        longest = max(len(a.ids) + a.longest for a in quiz.asks)
        length = quiz.asks[0].at.get("length", 1500)
        assert len(quiz.context) + longest == length
    assert len({quiz.key for quiz in made}) == len(made)


@pytest.mark.parametrize("name", ASKING)
def test_items_depend_on_the_seed_alone_and_more_trials_keep_the_first(name: str) -> None:
    one, same, more, other = (task(name).items(material(**o)) for o in ({}, {}, {"trials": 2}, {"seed": 1}))
    first, twin = ({q.key: q for q in items} for items in (one, same))
    assert all(torch.equal(q.context, twin[k].context) for k, q in first.items())
    grown = {q.key: q for q in more}
    assert len(grown) == 2 * len(first) and all(torch.equal(q.context, grown[k].context) for k, q in first.items())
    assert not any(torch.equal(a.context, b.context) for a, b in zip(one, other, strict=True))


def test_needles_lie_at_their_depths_and_wrong_answers_nowhere() -> None:
    made = material(6000)
    for quiz in task("needle").items(made)[-2:]:  # of few sentences, the nearest may be far
        text = made.tokenizer.decode(quiz.context)
        for ask in quiz.asks:
            sentence = made.tokenizer.decode(torch.cat([ask.ids, ask.answer])).strip()
            assert abs(text.index(sentence + ".") / len(text) - ask.at["depth"]) < 0.16
            assert all(made.tokenizer.decode(o).strip() not in text for o in ask.others) and len(ask.others) == 3


def test_multikey_asks_for_one_of_many_and_the_wrong_answers_are_of_others() -> None:
    made = material(context=4000)
    quizzes = task("multikey").items(made)
    assert [q.asks[0].at["keys"] for q in quizzes] == [4, 16, 64]
    for quiz in quizzes:
        text = made.tokenizer.decode(quiz.context)
        facts = dict(re.findall(r"The number of (the \w+ \w+) is (\d{5})\.", text))
        assert len(facts) == quiz.asks[0].at["keys"] and len(set(facts.values())) == len(facts)
        for ask in quiz.asks:
            key = re.search(r"The number of (the \w+ \w+) is$", made.tokenizer.decode(ask.ids))[1]  # type: ignore[index]
            assert made.tokenizer.decode(ask.answer).strip() == facts[key]
            wrong = {made.tokenizer.decode(o).strip() for o in ask.others}
            assert wrong <= set(facts.values()) - {facts[key]} and len(wrong) == 3


def test_tracking_follows_its_chains() -> None:
    made = material(context=3000)
    for quiz in task("tracking").items(made):
        text = made.tokenizer.decode(quiz.context)
        said = re.findall(r"VAR ([A-Z]{3}) = (?:VAR ([A-Z]{3})|(\d{5}))\.", text)
        held: dict[str, tuple[str, int]] = {}
        for name, source, number in said:  # in the order of the text: a source stands before its use
            held[name] = (number, 0) if number else (held[source][0], held[source][1] + 1)
        assert len(held) == 20 and len({value for value, _ in held.values()}) == 4
        for ask in quiz.asks:
            name = re.search(r"The value of VAR ([A-Z]{3}) is$", made.tokenizer.decode(ask.ids))[1]  # type: ignore[index]
            assert (made.tokenizer.decode(ask.answer).strip(), ask.at["hops"]) == held[name]
            assert {made.tokenizer.decode(o).strip() for o in ask.others} == {v for v, _ in held.values()} - {
                held[name][0]
            }


def test_copies_continue_the_text() -> None:
    made = material()
    for quiz in task("copy").items(made):
        for ask in quiz.asks:
            copied = torch.cat([ask.ids[-16:], ask.answer])
            windows = quiz.context.unfold(0, len(copied), 1)
            (place,) = (windows == copied).all(1).nonzero()[:, 0].tolist()
            assert ask.at["length"] < 1500 or abs(place / len(quiz.context) - ask.at["depth"]) < 0.1


# --- what known models score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("name", ["needle", "multikey", "copy"])
def test_a_model_that_copies_scores_one(name: str, chat: bool) -> None:
    one = task(name)
    got = figures(Copier(VOCABULARY), one, one.items(material(700, chat=chat)))
    assert got["exact"]["mean"] == got["tokens"]["mean"] == 1.0 and got["exact"]["interval"] == [1.0, 1.0]
    assert got.get("choice", {"mean": 1.0})["mean"] == 1.0 and got["margin"]["mean"] > 10
    assert all(cell["exact"] == 1.0 for cell in got["cells"])


def test_a_model_that_only_copies_does_not_track() -> None:
    one = task("tracking")
    got = figures(Copier(VOCABULARY), one, one.items(material(1200)))
    assert got["exact"]["mean"] == 0.0


@pytest.mark.parametrize("name", ASKING)
def test_a_model_that_knows_scores_one_and_one_that_lies_zero(name: str) -> None:
    one = task(name)
    items = one.items(material(1200))
    got = figures(Knower(VOCABULARY, items), one, items)
    assert got["exact"]["mean"] == got["tokens"]["mean"] == 1.0 and got["margin"]["mean"] > 10
    if name == "copy":
        return
    assert got["choice"]["mean"] == 1.0
    lies = figures(Knower(VOCABULARY, items, wrong=True), one, items)
    assert lies["exact"]["mean"] == lies["choice"]["mean"] == 0.0 and lies["margin"]["mean"] < -10


@pytest.mark.parametrize("name", ASKING)
def test_a_model_without_any_idea_scores_chance(name: str) -> None:
    one = task(name)
    got = figures(Oracle(VOCABULARY), one, one.items(material(1200)))
    assert got["exact"]["mean"] == got["tokens"]["mean"] == got["margin"]["mean"] == 0.0
    if name != "copy":
        assert got["choice"]["mean"] == got["chance"] == 0.25


def test_a_random_model_is_near_chance() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    one = task("needle")
    got = figures(LlamaForCausalLM(config).eval(), one, one.items(material(500, trials=8)))
    low, high = got["choice"]["interval"]
    assert got["asked"] == 48 and low <= 0.25 <= high and got["exact"]["mean"] == 0.0


def test_perplexity_of_a_model_without_any_idea_is_the_size_of_its_vocabulary() -> None:
    items = task("perplexity").items(material(600, trials=3))
    assert len(items) == 3 and all(isinstance(p, Passage) and len(p.ids) == 600 for p in items)
    reader = Reader(Oracle(VOCABULARY))
    units = [reader.passage(p, None, "it") for p in items]
    got = passage_figures(units, "nll", 600, seed=0)
    assert got["mean"] == pytest.approx(VOCABULARY, rel=1e-4) and got["interval"] == pytest.approx(
        [VOCABULARY] * 2, rel=1e-4
    )
    assert got["scored"] == 3 * 599 and [row["mean"] for row in got["curve"]] == pytest.approx(
        [VOCABULARY] * 12, rel=1e-4
    )


def test_pieces_of_text_are_disjoint_and_as_many_as_there_are() -> None:
    made = material(3000, trials=50)
    assert len(task("perplexity").items(made)) == len(made.ids) // 2999
    assert [p.key for p in task("kl").items(made)] == [p.key for p in task("perplexity").items(made)]


@pytest.mark.parametrize("name", ASKING)
def test_a_context_without_room_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no room for {name}.*pass a longer --context, or other --tasks"):
        task(name).items(material(130))
    with pytest.raises(DataError, match="the text has 100 tokens"):
        task(name).items(material(1500, characters=100))
