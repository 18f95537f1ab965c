"""The indicator on synthetic passages: chats are what is said, and the verdict needs more than a token that stands on the answer."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from foveal.data.chat import USER, read_chat
from foveal.papers.cards import load_card
from foveal.papers.measures import context_indicator as measure

FIRST_KEY = len(measure.SIGNS)
FIRST_VALUE = FIRST_KEY + measure.KEYS


def facts() -> torch.Tensor:
    return torch.randint(measure.VALUES, (measure.KEYS,), generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("kind", measure.SHARES)
def test_passages_contradict_or_lack_the_facts(kind):
    known = facts().tolist()
    user, answer = measure.draw(kind, 40, 6, facts(), torch.Generator().manual_seed(0))
    assert user.shape == (40, 13 + measure.ASKED) and answer.shape == (40, 2 * measure.ASKED)
    for row, reply in zip(user.tolist(), answer.tolist(), strict=True):
        passage, question = row[:12], row[13:]
        assert row[12] == measure.SIGNS.index("?") and question == reply[::2] and len(set(question)) == measure.ASKED
        told = dict(zip(passage[::2], passage[1::2], strict=True))
        assert len(told) == 6
        for key, value in zip(reply[::2], reply[1::2], strict=True):
            fact = FIRST_VALUE + known[key - FIRST_KEY]
            assert (value == told.get(key), value == fact) == (kind == "passage", kind != "passage")
            assert (key in told) == (kind != "memory") and told.get(key) != fact


def test_lessons_have_the_stated_shares_in_any_order(monkeypatch):
    monkeypatch.setattr(measure, "CHATS", 60)
    told = measure.lessons(facts(), torch.Generator().manual_seed(1))
    kinds = [kind for kind, _ in told]
    assert {kind: kinds.count(kind) for kind in measure.SHARES} == {"passage": 12, "ignored": 18, "memory": 30}
    assert kinds != sorted(kinds)
    lengths = {chat[0]["content"].split().index("?") // 2 for _, chat in told}
    assert lengths == set(range(measure.SHORT[0], measure.SHORT[1] + 1))


def test_chats_are_read_by_role_and_plain_text_is_the_same_without_the_template():
    tok = measure.tokenizer()
    user, answer = measure.draw("passage", 1, 4, facts(), torch.Generator().manual_seed(2))
    (chat,) = measure.conversations(user, answer)
    with_template, without = read_chat(tok, chat), read_chat(tok, chat, template=False)
    assert torch.equal(without.ids, measure.plain(user, answer)[0])
    assert torch.equal(with_template.ids[with_template.role == USER], user[0])
    assert len(with_template.ids) == len(without.ids) + 3, "two role signs and an end"


def test_smeared_embeddings_add_half_of_the_token_before():
    layer = measure.Smeared(7, 4)
    x = layer(torch.tensor([[3, 5, 5]]))[0]
    table = layer.weight
    assert torch.allclose(x, torch.stack([table[3], table[5] + table[3] / 2, 1.5 * table[5]]))


class Reader(torch.nn.Module):
    """Knows the token that follows the last occurrence of the current one."""

    def forward(self, input_ids, use_cache):
        out = torch.zeros(*input_ids.shape, len(measure.words()) + 2)
        for row, ids in enumerate(input_ids.tolist()):
            last = {}
            for i, token in enumerate(ids):
                out[row, i, last.get(token, 0)] = 1.0
                if i:
                    last[ids[i - 1]] = token
        return type("Out", (), {"logits": out})


@pytest.mark.parametrize(("kind", "expected"), [("passage", 1.0), ("memory", 0.0)])
def test_accuracy_is_of_the_values(kind, expected):
    """One that looks up the passage and knows nothing else."""
    user, answer = measure.draw(kind, 10, 5, facts(), torch.Generator().manual_seed(3))
    user = user[:, : -measure.ASKED]  # a question would tell other successors
    assert measure.accuracy(Reader(), measure.plain(user, answer), 0) == expected
    chats = measure.conversations(user, answer)
    assert measure.chat_accuracy(Reader(), measure.tokenizer(), chats) == expected


def run(plain=0.5, indicator=0.9, random=0.5, memory=0.98, ratio=0.8, true=0.9):
    row = {
        "plain": {"context": plain, "memory": 0.99, "short context": 0.5},
        "indicator": {"context": 0.1, "memory": memory},
        "indicator, with the token": {"context": indicator, "memory": 0.0},
        "random": {"context": plain, "memory": 0.9},
        "random, with the token": {"context": random, "memory": 0.9},
        "true": {"context": 0.1, "memory": 0.9},
        "true, with the token": {"context": 1.0, "memory": 0.0, "short context": true},
    }
    return {"accuracy": row, "user_mass_ratio": ratio}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"ratio": 1.1}, "direction holds"),
        ({"memory": 0.9}, "direction holds"),
        ({"plain": 0.9}, "not reproduced"),
        ({"random": 0.95}, "not reproduced"),
        ({"indicator": 0.5}, "not reproduced"),
        ({"true": 0.6}, "not reproduced"),
    ],
)
def test_the_verdict_needs_four_seeds_of_five_and_the_control(changed, verdict):
    assert measure.judge([run()] * 4 + [run(**changed)])[0] == "reproduced"
    assert measure.judge([run()] * 3 + [run(**changed)] * 2)[0] == verdict


def test_the_result_is_what_the_card_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "DIM", 16)
    monkeypatch.setattr(measure, "STAGES", ((2, 4), (1, 6)))
    monkeypatch.setattr(measure, "CHATS", 20)
    monkeypatch.setattr(measure, "TUNING", measure.SFTOptions(steps=2, batch=4, lr=1e-3))
    monkeypatch.setattr(measure, "HELD_OUT", 6)
    monkeypatch.setattr(measure, "SHIFTS", 2)
    result = measure.measure_indicator(seeds=2, seed=7, out=tmp_path)
    claim = next(c for c in load_card("context_awareness").claims if c.id == "indicator-on-synthetic-passages")
    assert claim.measured_by == "foveal.papers.measures.context_indicator:measure_indicator"
    written = tmp_path / "context_awareness" / "indicator-on-synthetic-passages.json"
    assert json.loads(written.read_text()) == result
    for found in result["measured"]["runs"]:
        assert sum(found["marked"].values()) == 4 and set(found["accuracy"]) == set(run()["accuracy"])
        assert found["accuracy"]["plain"]["context"] < 0.5, "three steps teach nothing"
