"""The search: shortlist and knapsack against brute force; confirmation and scores on a tiny model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from foveal.core.budget import Budget
from foveal.data.needle import Needles, Question
from foveal.patterns import BlockTopK, Dense, SlidingWindow, Triangle
from foveal.policies import Policy, Rule
from foveal.tune.journal import Journal
from foveal.tune.meter import DenseLogits, Meter
from foveal.tune.search import _Whole, choose, search
from foveal.tune.survey import Confirmer, Trial, confirmed_rows, shortlist, survey


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(8)
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (1, 160), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def texts() -> torch.Tensor:
    return torch.randint(0, 64, (3, 160), generator=torch.Generator().manual_seed(0))


def random_trials(seed: int, layers: int = 4, options: int = 4) -> list[list[Trial]]:
    g = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(layers):
        row = [Trial(0, 0.0, 1.0)]
        for option in range(1, options):
            cost, kl = torch.rand(2, generator=g).tolist()
            row.append(Trial(option, kl, cost, kl * 0.01 if option != 3 else None))
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", range(8))
def test_choose_equals_brute_force_within_its_resolution(seed):
    trials, limit = random_trials(seed), 0.012
    picked = choose(trials, limit)
    spent = sum(trials[i][o].kl or 0.0 for i, o in enumerate(picked))
    assert spent <= limit
    assert all(trials[i][o].kl is not None or o == 0 for i, o in enumerate(picked)), "an unconfirmed option was chosen"
    seconds = sum(trials[i][o].seconds for i, o in enumerate(picked))
    tighter = limit * (1 - len(trials) / 2000)  # every layer's KL is rounded up to one of 2000 bins
    best = math.inf
    for combination in itertools.product(range(4), repeat=len(trials)):
        parts = [trials[i][o] for i, o in enumerate(combination)]
        if all(t.option == 0 or t.kl is not None for t in parts) and sum(t.kl or 0.0 for t in parts) <= tighter:
            best = min(best, sum(t.seconds for t in parts))
    assert seconds <= best + 1e-12


def test_choose_keeps_everything_dense_when_nothing_fits():
    assert choose(random_trials(0), 1e-9) == [0, 0, 0, 0]


def test_shortlist_drops_slower_and_dominated_options():
    trials = [Trial(0, 0.0, 1.0), Trial(1, 0.1, 2.0), Trial(2, 0.1, 0.5), Trial(3, 0.2, 0.6), Trial(4, 0.5, 0.1)]
    assert set(shortlist(trials)) == {2, 4}
    assert shortlist([Trial(0, 0.0, 1.0), Trial(1, 0.0, 1.5)]) == []


def test_scores_are_the_output_errors_of_every_layer(model, ids):
    options = [Dense(), SlidingWindow(8), SlidingWindow(32), SlidingWindow(200)]
    found = survey(Meter(model), ids, options)
    assert [sorted(layer) for layer in found.kept] == [[0, 1, 2, 3]] * 3
    assert len(found.trials) == 3
    for row in found.trials:
        assert row[0].error == 0.0
        assert row[1].error > row[2].error > 0
        assert row[3].error == 0.0


def test_layers_that_share_a_mask_share_the_median_time(model, ids):
    trials = survey(Meter(model), ids, [Dense(), SlidingWindow(8)]).trials
    assert {tuple(t.seconds for t in row) for row in trials} == {tuple(t.seconds for t in trials[0])}


def test_a_survey_knows_the_dense_loss_and_follows_given_scores(model, ids):
    meter, options = Meter(model), [Dense(), SlidingWindow(8), SlidingWindow(32)]
    scores = [[Trial(0, 0.0, 1.0), Trial(1, 0.5, 0.2), Trial(2, 0.1, 2.0)]] * 3
    found = survey(meter, ids, options, scores)
    assert found.trials == scores
    assert [list(layer) for layer in found.kept] == [[1]] * 3, "only what is worth confirming is selected"
    assert found.nll == pytest.approx(float(meter.quality(ids, None).nll.mean()), abs=1e-5)


@pytest.mark.parametrize("family", ["full", "sliding"])
@pytest.mark.parametrize(
    "pattern",
    [
        SlidingWindow(16),
        Triangle(16, sinks=2, dense_rows=40),
        BlockTopK(budget=Budget(density=0.4), q_block=16, kv_block=16),
    ],
)
def test_confirmed_kl_is_that_of_the_whole_prompt(model, monkeypatch, pattern, family):
    """In the last layer no row influences another, so the block's KL must be that of one pass over the whole prompt."""
    if family == "sliding":
        model = hybrid()
    ids = torch.randint(0, 64, (1, 200), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr("foveal.tune.survey.ROWS", 32)
    first, last = confirmed_rows(200)
    assert (first, last) == (128, 160)
    meter = Meter(model)
    confirmer = Confirmer(meter, survey(meter, ids, [Dense(), pattern]))
    assert confirmer.kl(1, 0) == pytest.approx(0.0, abs=1e-9)
    got = confirmer.kl(2, 1)
    with meter.under(None):
        dense = torch.log_softmax(model(ids).logits[0, first:last].double(), -1)
    with meter.under(Policy(layers=((2, Rule(pattern)),))):
        other = torch.log_softmax(model(ids).logits[0, first:last].double(), -1)
    expected = float((dense.exp() * (dense - other)).sum(-1).mean())
    assert expected > 1e-6
    assert got == pytest.approx(expected, rel=1e-3)


def hybrid() -> Gemma3ForCausalLM:
    """Two layers with a rolling cache of 24 tokens before one of full attention."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, max_position_embeddings=256, sliding_window=24, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.dim() > 1 else 0.1))
    return model


@pytest.fixture
def timed(monkeypatch):
    """Real scores, but with clear times: this machine's noise must not decide."""
    real = survey

    def clear(*args, **kwargs):
        found = real(*args, **kwargs)
        for row in found.trials:
            for trial, seconds in zip(row, (1.0, 0.2, 0.5), strict=True):
                trial.seconds = seconds
        return found

    monkeypatch.setattr("foveal.tune.search.survey", clear)


def test_search_stays_inside_the_limit_and_resumes_from_the_journal(model, texts, tmp_path, timed, monkeypatch):
    options = [Dense(), SlidingWindow(16, 2), SlidingWindow(64, 2)]
    journal = Journal(tmp_path / "j.jsonl", "d")
    found, policy = search(Meter(model), texts, options, 0.01, journal, lambda p: Dense(), lambda line: None)
    best = [r for r in found.rounds if r["measured_ppl_increase"] <= 0.01]
    assert best, "no round was inside the limit"
    assert any(found.picked), "a tolerant tiny model leaves something to sparsify"
    assert found.texts == 3
    assert policy.rule(0).pattern(decoding=True) == Dense()
    assert [policy.rule(i).prefill for i in range(3)] == [options[o] for o in found.picked]

    def never(*_: object) -> None:
        raise AssertionError("measured again although the journal holds it")

    monkeypatch.setattr("foveal.tune.search.survey", never)
    monkeypatch.setattr("foveal.tune.search.Confirmer", never)
    again, same = search(
        Meter(model), texts, options, 0.01, Journal(tmp_path / "j.jsonl", "d"), lambda p: Dense(), lambda line: None
    )
    assert same == policy and again.picked == found.picked


def test_an_interrupted_search_does_not_score_again(model, texts, tmp_path, timed, monkeypatch):
    """Scores of the first text are journaled before the others are looked at, and each confirmed layer at once."""
    options = [Dense(), SlidingWindow(16, 2), SlidingWindow(64, 2)]

    def go(name: str) -> tuple[list[int], list[list[Trial]]]:
        journal = Journal(tmp_path / name, "d")
        found, _ = search(Meter(model), texts, options, 0.01, journal, lambda p: Dense(), lambda line: None)
        return found.picked, found.trials

    expected = go("whole.jsonl")
    real, calls = Confirmer.kl, []

    def breaks(self: Confirmer, layer: int, option: int) -> float:
        calls.append(layer)
        if layer == 2:
            raise KeyboardInterrupt
        return real(self, layer, option)

    monkeypatch.setattr(Confirmer, "kl", breaks)
    with pytest.raises(KeyboardInterrupt):
        go("cut.jsonl")
    calls.clear()
    monkeypatch.setattr(Confirmer, "kl", lambda self, layer, option: calls.append(layer) or real(self, layer, option))
    monkeypatch.setattr("foveal.tune.survey._score", lambda *_: pytest.fail("scored again"))
    assert go("cut.jsonl") == expected
    assert set(calls) == {2}


@pytest.fixture(scope="module")
def writer() -> LlamaForCausalLM:
    """A tiny model whose attention matters: texts that it wrote itself cost more under every sparse pattern."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=320,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.self_attn.o_proj):
                part.weight.mul_(8)
        model.lm_head.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def written(writer) -> torch.Tensor:
    """Three texts by the writer, each token drawn from its distribution."""
    g, ids = torch.Generator().manual_seed(0), torch.tensor([[1], [2], [3]])
    with torch.inference_mode():
        for _ in range(319):
            ids = torch.cat([ids, torch.multinomial(writer(ids).logits[:, -1].softmax(-1), 1, generator=g)], 1)
    return ids


def test_the_policy_holds_on_every_search_text(writer, written, tmp_path, timed):
    """What is picked stays inside the limit on each text, not only on average or on the first."""
    options = [Dense(), SlidingWindow(48, 2), SlidingWindow(100, 2)]
    meter, limit = Meter(writer), 0.05
    found, policy = search(
        meter, written, options, limit, Journal(tmp_path / "j", "d"), lambda p: Dense(), lambda line: None
    )
    increases = [
        math.expm1(float((meter.quality(t, policy).nll - meter.quality(t, None).nll).mean())) for t in written.split(1)
    ]
    assert any(found.picked) and max(increases) <= limit
    broken = [r["measured_ppl_increase"] for r in found.rounds if r["measured_ppl_increase"] > limit]
    assert broken, "the test needs a policy that was refused"


def test_the_text_that_breaks_the_limit_is_measured_first_and_ends_the_round(model, texts, tmp_path):
    journal = Journal(tmp_path / "j", "d")
    journal.put("search.dense", {"nll": [float(Meter(model).quality(t, None).nll.mean()) for t in texts.split(1)]})
    policy = Policy.uniform(SlidingWindow(4))
    whole = _Whole(Meter(model), texts, math.inf, journal)
    worst = whole.increase([1], policy)
    each = [journal[f"search.whole.{t}.1"]["increase"] for t in range(3)]
    assert worst == max(each) and whole.order[0] == each.index(worst)
    whole.limit = worst / 2
    assert whole.increase([2], policy) == pytest.approx(worst)
    assert [k for k in journal if k.endswith(".2")] == [f"search.whole.{whole.order[0]}.2"]


def test_meter_figures_equal_plain_transformers(model, ids):
    meter, reference = Meter(model), DenseLogits(rows=16)
    got = meter.quality(ids, None, reference)
    with torch.inference_mode():
        logits = model(ids).logits[0]
    half = ids.shape[1] // 2
    expected = torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="none")[-half:]
    assert torch.allclose(got.nll.double(), expected, atol=1e-5)
    assert meter.quality(ids, Policy.uniform(Dense()), reference).kl == pytest.approx(0.0, abs=1e-6)
    window = meter.quality(ids, Policy.uniform(SlidingWindow(8)), reference)
    assert window.kl > 1e-4
    n = ids.shape[1]
    assert window.density.density == pytest.approx((8 * n - 28) / (n * (n + 1) / 2))


def test_decoding_is_prefill_then_single_tokens(model, ids):
    meter = Meter(model)
    with torch.inference_mode():
        asked = torch.cat([ids[0], torch.tensor([1, 2, 3])])
        answer = model(asked[None]).logits[0, -1:].argmax(-1)
    questions = (Question(asked[-3:], answer, 0.5, 80), Question(asked[-3:], (answer + 1) % 64, 0.5, 80))
    needles = Needles(ids[0], questions)
    dense = meter.decoding(needles, 24, None)
    teacher = meter.quality(ids, None).nll[-24:]
    assert torch.allclose(dense.nll, teacher, atol=1e-4)
    assert dense.hits == (True, False)
    policy = Policy.uniform(SlidingWindow(12, 1))
    window = meter.decoding(needles, 24, policy)
    assert torch.allclose(window.nll, meter.quality(ids, policy).nll[-24:], atol=1e-4)
    assert window.density.density == pytest.approx(13 / ids.shape[1])
