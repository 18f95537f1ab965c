"""Reading: scores are those of one plain pass, whatever the cache does, and passages compare with dense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="needs the package transformers")

from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import foveal
from foveal.core.errors import ModelError
from foveal.evals import reader as module
from foveal.evals.base import Ask, Passage, Quiz
from foveal.evals.reader import Reader
from foveal.patterns import Dense, SlidingWindow
from foveal.policies import Policy

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def llama() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
    return model


def mistral() -> Any:
    """Its cache forgets what lies outside its window, so it cannot be rewound."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=9)).eval()


def ids(count: int, seed: int) -> Tensor:
    return torch.randint(50, (count,), generator=torch.Generator().manual_seed(seed))


def quiz() -> Quiz:
    asks = tuple(Ask(ids(3 + i, i), ids(4, 10 + i), (ids(4, 20 + i), ids(2, 30 + i)), {"depth": i}) for i in range(3))
    return Quiz("it", ids(40, 99), asks)


def policy() -> Policy:
    return Policy.uniform(SlidingWindow(8, 1))


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("sparse", [False, True])
def test_answers_score_as_in_one_pass_without_cache(make: Any, sparse: bool) -> None:
    if sparse and make is mistral:
        pytest.skip("one policy on one model is enough")
    model, one = make(), quiz()
    got = Reader(model).quiz(one, policy() if sparse else None, "it")["asks"]
    for ask, row in zip(one.asks, got, strict=True):
        found = []
        for answer in (ask.answer, *ask.others):
            whole = torch.cat([one.context, ask.ids, answer])[None]
            with torch.no_grad():
                if sparse:
                    with foveal.attach(model, policy()):
                        logits = model(whole, use_cache=False).logits
                else:
                    logits = model(whole, use_cache=False).logits
            log_p = torch.log_softmax(logits[0, -len(answer) - 1 : -1], -1)
            found.append(float(log_p.gather(1, answer[:, None]).sum()))
            if answer is ask.answer:
                right = int((log_p.argmax(-1) == answer).sum())
                others = log_p.scatter(1, answer[:, None], -torch.inf).amax(1)
                gap = float((log_p.gather(1, answer[:, None])[:, 0] - others).mean())
        assert [row["logp"], *row["others"]] == pytest.approx(found, abs=2e-4)
        assert row["gap"] == pytest.approx(gap, abs=2e-4) and (row["right"], row["tokens"]) == (right, 4)
        assert row["at"] == ask.at


def test_a_policy_changes_answers() -> None:
    reader = Reader(llama())
    dense, sparse = (reader.quiz(quiz(), p, "it")["asks"] for p in (None, policy()))
    assert max(abs(a["logp"] - b["logp"]) for a, b in zip(dense, sparse, strict=True)) > 1e-3


def test_passages_compare_with_dense() -> None:
    model, passage = llama(), Passage("text.0", ids(61, 5))
    reader = Reader(model)
    dense = reader.passage(passage, None, "dense")
    with torch.no_grad():
        log_p = torch.log_softmax(model(passage.ids[None]).logits[0, :-1], -1)
    nll = -log_p.gather(1, passage.ids[1:, None])[:, 0]
    assert dense["position"] == list(range(1, 61)) and dense["nll"] == pytest.approx(nll.tolist(), abs=2e-5)
    assert dense["kl"] == [] and dense["density"] == 1.0
    same = reader.passage(passage, Policy.uniform(Dense()), "same")
    assert same["density"] == 1.0 and max(same["kl"]) < 1e-5 and same["nll"] == pytest.approx(dense["nll"], abs=1e-4)
    sparse = reader.passage(passage, policy(), "sparse")
    with torch.no_grad(), foveal.attach(model, policy()):
        log_q = torch.log_softmax(model(passage.ids[None]).logits[0, :-1], -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert sparse["kl_position"] == list(range(1, 61)) and sparse["kl"] == pytest.approx(kl.tolist(), abs=2e-5)
    assert max(sparse["kl"][:8]) < 1e-5 < max(sparse["kl"]), "the window covers the first rows"
    assert 0.1 < sparse["density"] < 0.5


def test_a_policy_after_an_interruption_reads_dense_again() -> None:
    passage = Passage("text.0", ids(61, 5))
    whole = Reader(llama())
    whole.passage(passage, None, "dense")
    expected = whole.passage(passage, policy(), "sparse")
    fresh = Reader(llama())
    other = Passage("text.1", ids(61, 6))
    fresh.passage(other, None, "dense")  # the reference of another passage must not serve
    assert fresh.passage(passage, policy(), "sparse") == expected


def test_long_passages_are_scored_at_evenly_spread_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    passage = Passage("text.0", ids(62, 5))
    every = Reader(llama()).passage(passage, None, "dense")
    monkeypatch.setattr(module, "LOGIT_BYTES", 4 * 50 * 21)
    monkeypatch.setattr(module, "KL_ROWS", 5)
    reader = Reader(llama())
    some = reader.passage(passage, None, "dense")
    assert some["position"] == list(range(1, 62, 3))
    assert some["nll"] == pytest.approx([every["nll"][p - 1] for p in some["position"]], abs=2e-5)
    kl = reader.passage(passage, policy(), "sparse")
    assert len(kl["kl"]) == 5 and kl["kl_position"] == [1, 16, 31, 46, 61]


def test_broken_weights_are_named() -> None:
    model = llama()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ModelError, match="the logits of dense are NaN"):
        Reader(model).passage(Passage("text.0", ids(20, 0)), None, "dense")
    with pytest.raises(ModelError, match="the logits of mine are NaN"):
        Reader(model).quiz(quiz(), None, "mine")
