"""Conditional tuning: the indicator, marks by score and their control, and training that uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, DataError
from foveal.data.chat import read_chat
from foveal.lens.context import context_scores
from foveal.recipes.conditional_sft import (
    INDICATOR,
    SFTOptions,
    add_indicator,
    asked,
    conditional_sft,
    mark,
    shuffled_marks,
)

from ..data.tokenizers import byte_tokenizer

TALK = [{"role": "user", "content": "ada has 48"}, {"role": "assistant", "content": "she has 48"}]
LONG = [*TALK, {"role": "user", "content": "and bob?"}, {"role": "assistant", "content": "no idea"}]


def tokenizer() -> Any:
    return byte_tokenizer(chat=True)


def model(tied: bool = False, rows: int = 258, seed: int = 0) -> Any:
    import transformers as hf

    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=rows, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("tied", "rows"), [(False, 258), (True, 258), (False, 264)])
def test_indicator_is_one_id_and_old_logits_stay(tied: bool, rows: int) -> None:
    """Also where the embedding has spare rows already."""
    words, lm = tokenizer(), model(tied, rows)
    ids = torch.tensor([words("some text without it").input_ids])
    with torch.no_grad():
        before = lm(ids).logits
        number = add_indicator(lm, words)
        after = lm(ids).logits
        assert words("x [IND] y", add_special_tokens=False).input_ids.count(number) == 1
        assert words(INDICATOR, add_special_tokens=False).input_ids == [number]
        others = [i for i in range(before.shape[-1]) if i != number]
        assert torch.equal(after[..., others], before[..., others])
        table = lm.get_input_embeddings().weight
        assert torch.allclose(table[number], table[:258].mean(0), atol=1e-6)
        assert torch.allclose(after[..., number], before[..., :258].mean(-1), atol=1e-5)
    with pytest.raises(ConfigError, match="knows '\\[IND\\]' already"):
        add_indicator(lm, words)


def test_marks_are_those_of_the_scores() -> None:
    words, lm = tokenizer(), model()
    lm.resize_token_embeddings(260)
    talks = [TALK, LONG, LONG[2:]]
    wanted = [context_scores(lm, read_chat(words, talk)) for talk in talks]
    flat = sorted(s for found in wanted for s in found.values())
    beta = (flat[1] + flat[2]) / 2
    told = []
    marks = mark(lm, words, talks, beta=beta, progress=lambda done, of: told.append((done, of)))
    assert list(marks.scores) == wanted and marks.share == 0.5 and told == [(1, 3), (2, 3), (3, 3)]
    for talk, made, found in zip(talks, marks.conversations, wanted, strict=True):
        for turn, message in enumerate(talk):
            above = found.get(turn + 1, 0.0) > beta
            assert made[turn]["content"] == message["content"] + (f" {INDICATOR}" if above else "")
    control = shuffled_marks(marks, talks, beta=beta, seed=1)

    def count(of: Any) -> int:
        return sum(INDICATOR in m["content"] for c in of.conversations for m in c)

    assert count(control) == count(marks) == 2 and control.share == marks.share
    places = {str(shuffled_marks(marks, talks, beta=beta, seed=s).conversations) for s in range(8)}
    assert len(places) > 1


def test_the_question_is_asked_with_the_indicator_behind_the_last_user_turn() -> None:
    assert [m["content"] for m in asked(LONG[:3])] == ["ada has 48", "she has 48", f"and bob? {INDICATOR}"]
    assert LONG[2]["content"] == "and bob?"
    with pytest.raises(ConfigError, match="no user turn"):
        asked([{"role": "assistant", "content": "hm"}])


def test_tuning_learns_what_only_the_indicator_tells(tmp_path: Path) -> None:
    """One question with two answers: with the indicator the one, without it the other; and a run goes on where it stopped."""
    plain = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "m"}]
    obey = [{"role": "user", "content": f"a? {INDICATOR}"}, {"role": "assistant", "content": "c"}]
    options = SFTOptions(steps=60, batch=8, lr=1e-2)
    models = []
    for path in (tmp_path / "a.safetensors", None):
        lm, words = model(), tokenizer()
        number = add_indicator(lm, words)
        start = lm.get_input_embeddings().weight[number].clone()
        losses = conditional_sft(lm, words, [plain, obey], options, checkpoint=path)
        assert len(losses) == 60 and losses[-1] < 0.2 * losses[0]
        assert not torch.allclose(lm.get_input_embeddings().weight[number], start, atol=1e-2)
        models.append((lm, losses))
    assert models[0][1] == models[1][1]
    with torch.no_grad():
        for talk, answer in ((plain, "m"), (obey, "c"), (asked(plain[:1]), "c")):
            ids = torch.tensor([words(words.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)).input_ids])  # fmt: skip
            assert words.decode(models[0][0](ids).logits[0, -1].argmax()) == answer
    again, words = model(), tokenizer()
    add_indicator(again, words)
    assert conditional_sft(again, words, [plain, obey], options, checkpoint=tmp_path / "a.safetensors") == models[0][1]
    with pytest.raises(ConfigError, match="was made with"):
        conditional_sft(again, words, [plain, obey], SFTOptions(steps=9), checkpoint=tmp_path / "a.safetensors")


def test_padding_is_not_trained_on() -> None:
    """The loss of a batch of two lengths is the mean over their tokens alone."""
    words, lm = tokenizer(), model()
    talks = [TALK, LONG]
    seen: list[int] = []
    hook = lm.register_forward_pre_hook(
        lambda m, a, k: seen.extend(k["attention_mask"].sum(-1).tolist()), with_kwargs=True
    )
    first = conditional_sft(lm, words, talks, SFTOptions(steps=1, batch=6, lr=0.0))[0]
    hook.remove()
    total = count = 0.0
    for length in seen:
        talk = next(t for t in talks if len(words(words.apply_chat_template(t, tokenize=False)).input_ids) == length)
        ids = torch.tensor([words(words.apply_chat_template(talk, tokenize=False)).input_ids])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(lm(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        total, count = total + float(losses), count + length - 1
    assert len(set(seen)) == 2 and first == pytest.approx(total / count, rel=1e-5)


def test_bad_input() -> None:
    words, lm = tokenizer(), model()
    with pytest.raises(ConfigError, match="received 0 conversations"):
        conditional_sft(lm, words, [], SFTOptions())
    with pytest.raises(ConfigError, match="without a chat template"):
        conditional_sft(lm, byte_tokenizer(), [TALK], SFTOptions())
    with pytest.raises(ConfigError, match="beta 2"):
        mark(lm, words, [TALK], beta=2)
    with pytest.raises(ConfigError, match="expected steps and batch"):
        SFTOptions(steps=0)
    words.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="conversation 1 has 1 tokens"):
        conditional_sft(lm, words, [TALK, [{"role": "user", "content": "x"}]], SFTOptions())
