"""Mass by role against eager attention weights, scores of both variants, templates, and the needle metric."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from foveal.core.errors import ConfigError, DataError, ShapeError
from foveal.data.chat import ASSISTANT, BOS, TEMPLATE, USER, Chat, read_chat
from foveal.lens.context import (
    allocation,
    context_scores,
    group_mass,
    marked,
    middle_layer,
    recall,
    score_of,
    template_shift,
)

from ..data.tokenizers import byte_tokenizer
from ..hf import models

N = 20
TALK = [
    {"role": "user", "content": "the code is 48"}, {"role": "assistant", "content": "noted"},
    {"role": "user", "content": "what was it?"}, {"role": "assistant", "content": "it was 48"},
]  # fmt: skip


def tiny():
    return models.build("llama", "eager").double()


def chat(seed: int = 0) -> Chat:
    """BOS, template, user, assistant, user, assistant."""
    role = torch.tensor([BOS, TEMPLATE, *[USER] * 5, TEMPLATE, *[ASSISTANT] * 4, *[USER] * 4, *[ASSISTANT] * 4])
    turn = torch.tensor([-1, -1, *[0] * 5, -1, *[1] * 4, *[2] * 4, *[3] * 4])
    return Chat(models.tokens(1, N, seed)[0], role, turn)


def dense(model, ids):
    with torch.no_grad():
        return [a.double() for a in model(input_ids=ids, output_attentions=True).attentions]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "gpt_oss"])
def test_indicator_value_attention_equals_the_summed_map(name):
    model, c = models.build(name, "eager"), chat()
    mass = group_mass(model, c.ids[None], c.role[None], 4)
    for layer, a in enumerate(dense(model, c.ids[None])):
        for role in range(4):
            torch.testing.assert_close(
                mass[layer][0, :, :, role].double(), a[0, :, :, c.role == role].sum(-1), rtol=0, atol=1e-5
            )
        if name != "gpt_oss":  # learned sinks take a share
            torch.testing.assert_close(mass[layer].sum(-1), torch.ones(1, models.HEADS, N), rtol=0, atol=1e-5)


def test_scores_are_means_over_the_response():
    model, c = tiny(), chat()
    a = dense(model, c.ids[None])[2][0]
    user = a[:, :, c.role == USER].sum(-1)
    code, paper = (context_scores(model, c, 2, variant=v) for v in ("code", "paper"))
    for turn, rows in ((1, slice(8, 12)), (3, slice(16, 20))):
        assert code[turn] == pytest.approx(float(user[:, rows].amax(0).mean()), abs=1e-6)
        assert paper[turn] == pytest.approx(float(user[:, rows].mean(1).amax()), abs=1e-6)
        assert 0 <= paper[turn] <= code[turn] <= 1
        for head in range(models.HEADS):
            assert code[turn] >= float(user[head, rows].mean()) - 1e-6, "at least every fixed head's score"


def test_both_variants_agree_when_one_head_dominates():
    mass = torch.tensor([[0.5, 0.9, 0.4], [0.1, 0.2, 0.3]])
    assert score_of(mass, "code") == score_of(mass, "paper") == pytest.approx(0.6)
    crossed = torch.tensor([[0.5, 0.1], [0.1, 0.5]])
    assert score_of(crossed, "code") == pytest.approx(0.5) and score_of(crossed, "paper") == pytest.approx(0.3)


def test_no_user_no_score_and_more_user_never_less():
    model, c = tiny(), chat()
    nobody = replace(c, role=torch.where(c.role == USER, TEMPLATE, c.role))
    assert set(context_scores(model, nobody).values()) == {0.0}
    later = replace(c, role=torch.where((c.role == USER) & (c.turn == 0), TEMPLATE, c.role))
    some, everything = context_scores(model, later, 1)[3], context_scores(model, c, 1)[3]
    assert some <= everything + 1e-6


def test_padding_and_batch_do_not_change_the_mass():
    model = tiny()
    a, b = chat(0), chat(1)
    pad = 6
    ids = torch.cat(
        [torch.cat([torch.zeros(pad, dtype=torch.long), a.ids])[None], torch.cat([b.ids, b.ids[:pad]])[None]]
    )
    role = torch.cat([torch.cat([torch.full((pad,), -1), a.role])[None], torch.cat([b.role, b.role[:pad]])[None]])
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    both = group_mass(model, ids, role, 4, attention_mask=mask)
    for layer, alone in group_mass(model, a.ids[None], a.role[None], 4).items():
        torch.testing.assert_close(both[layer][0, :, pad:], alone[0], rtol=0, atol=1e-5)


def test_a_cut_response_has_no_score_and_is_not_dependent():
    scores = context_scores(tiny(), chat(), limit=14)
    assert math.isnan(scores[3]) and not math.isnan(scores[1])
    assert marked(TALK, scores, beta=-1)[2]["content"] == TALK[2]["content"]
    assert (
        marked(TALK, {1: 0.7, 3: 0.6})[0]["content"].endswith(" [IND]")
        and "[IND]" not in marked(TALK, {3: 0.6})[2]["content"]
    )


# --- chats --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
def test_tokens_know_whose_they_are(bos):
    tokenizer = byte_tokenizer(bos=bos, chat=True)
    for template in (True, False):
        c = read_chat(tokenizer, TALK, template=template)
        for turn, message in enumerate(TALK):
            mine = c.turn == turn
            assert tokenizer.decode(c.ids[mine]) == message["content"]
            assert set(c.role[mine].tolist()) == {USER if turn % 2 == 0 else ASSISTANT}
        assert (c.role[0] == BOS) == (bos and not template)
    open_ended = read_chat(tokenizer, TALK)
    assert tokenizer.decode(open_ended.ids).endswith("it was 48"), "the response is left open"
    assert tokenizer.decode(read_chat(tokenizer, TALK[:3]).ids).endswith("<|assistant|>")


@pytest.mark.parametrize("bos", [True, False])
def test_template_shift_reuses_the_head_of_the_plain_run(bos):
    torch.manual_seed(0)
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = models.fill(transformers.LlamaForCausalLM(config).eval()).double()
    tokenizer = byte_tokenizer(bos=bos, chat=True)
    prompt = [TALK[0], {"role": "assistant", "content": "the code"}]
    shift = template_shift(model, tokenizer, prompt, 1)
    plain = read_chat(tokenizer, prompt, template=False)
    assert (plain.role[0] == BOS) == bos
    plain.role[0] = BOS  # the first token holds the sink, with or without a BOS token
    user = dense_user(model, plain)
    assert shift.plain.head == shift.templated.head == int(user.argmax())
    assert shift.plain.user == pytest.approx(float(user.max()), abs=1e-5)
    for a in (shift.plain, shift.templated):
        assert a.user + a.assistant + a.template + a.bos == pytest.approx(1, abs=1e-5)
        b = a.without_template()
        assert b.template == 0 and b.user + b.assistant + b.bos == pytest.approx(1)
    assert shift.ratio == pytest.approx(shift.templated.without_template().user / shift.plain.without_template().user)
    assert shift.to_json()["plain"]["user"] == shift.plain.user
    assert allocation(model, plain, 1, head=2).head == 2


def dense_user(model, c):
    masses = group_mass(model, c.ids[None], torch.where(c.role == USER, 0, -1)[None], 1, layers=[1])
    return masses[1][0, :, -1, 0]


# --- the rest -----------------------------------------------------------------------------------------------------------


def test_recall_counts_whole_words():
    needle = "eat a sandwich and sit in the park"
    words = ["eat", "sandwich", "sit", "park"]
    assert recall(words, needle.upper() + "!") == 1 and recall(words, "") == 0
    assert recall(["sit"], "sitting") == 0 and recall(["sit", "park"], "a car-park; sit.") == 0.5


def test_middle_layer_is_the_papers():
    assert middle_layer(22) == 15 and middle_layer(30) == 20 and middle_layer(1) == 0


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: group_mass(tiny(), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 5), 2), ShapeError, "the same"),
        (
            lambda: group_mass(tiny(), torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4), 17),
            ConfigError,
            "1 to 16",
        ),
        (lambda: context_scores(tiny(), chat(), 3), ConfigError, "no layer 3"),
        (lambda: context_scores(tiny(), chat(), variant="both"), ConfigError, "variant is 'both'"),
        (lambda: allocation(tiny(), chat(), 0, head=4), ConfigError, "no head 4"),
        (lambda: template_shift(tiny(), byte_tokenizer(chat=True), TALK[:1]), ConfigError, "response prefix"),
        (lambda: read_chat(byte_tokenizer(), TALK), ConfigError, "no chat template"),
        (lambda: read_chat(byte_tokenizer(), [{"role": "tool", "content": ""}]), ConfigError, "expected dicts"),
        (lambda: recall([], "a"), ConfigError, "keywords is empty"),
    ],
)
def test_bad_input_is_one_clear_error(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_a_template_that_rewrites_messages_is_refused():
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises((DataError, ValueError), match="rewrites message 0"):
        read_chat(tokenizer, TALK[:1])
