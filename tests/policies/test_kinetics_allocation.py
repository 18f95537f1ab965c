"""Kinetics: coverage, frontiers, what a limit buys, and reading traces."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveal.core.errors import ConfigError, DataError
from foveal.policies.kinetics import DENSE, MODELS, Method, decode_cost
from foveal.policies.kinetics_allocation import (
    Choice,
    Trace,
    affordable,
    best_within,
    by_question,
    choices,
    common_choices,
    coverage,
    envelope,
    log_spaced,
    oracle_accuracy,
    read_traces,
)  # fmt: skip

SMALL, LARGE = MODELS["qwen3-0.6b"], MODELS["qwen3-8b"]
TOP = Method("topk", budget=256)


def traces(seed: int = 0) -> list[Trace]:
    rng = random.Random(seed)
    out = []
    for q, model, method in itertools.product(range(4), (SMALL, LARGE), (DENSE, TOP)):
        lengths = tuple(rng.randint(200, 9000) for _ in range(8))
        out.append(Trace(str(q), model, method, 128, lengths, tuple(rng.random() < 0.4 for _ in lengths)))
    return out


@pytest.mark.parametrize("n", range(1, 9))
def test_coverage_equals_enumeration(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([i < c for i in range(n)], k))
        assert coverage(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))
        assert coverage(n, c, 1) == pytest.approx(c / n) and coverage(n, 0, k) == 0
        assert n - c >= k or coverage(n, c, k) == 1


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(0, 1)), min_size=1, max_size=30), st.floats(0, 120))
def test_the_envelope_knows_the_best_within_every_limit(points, limit):
    found = [Choice("m", DENSE, 1, None, cost, accuracy) for cost, accuracy in points]
    best = best_within(envelope(found), limit)
    inside = [c.accuracy for c in found if c.cost <= limit]
    assert (best.accuracy if best else None) == (max(inside) if inside else None)


def test_frontiers_never_fall_and_more_methods_never_hurt():
    every = by_question(traces())
    dense = {q: [c for c in found if c.method.kind == "dense"] for q, found in every.items()}
    limits = log_spaced(1e12, 1e17)
    both, alone = oracle_accuracy(every, limits), oracle_accuracy(dense, limits)
    assert both == sorted(both) and alone == sorted(alone) and all(a >= b for a, b in zip(both, alone, strict=True))
    assert any(a > b for a, b in zip(both, alone, strict=True)) and both[0] == 0 < both[-1]
    best = envelope(common_choices(every))[-1]
    assert 0 < best.accuracy <= both[-1], "a choice per question is an upper bound once all are affordable"


def test_choices_cost_the_mean_over_trials_and_end_at_the_cap():
    trace = Trace("q", SMALL, DENSE, 100, (10, 50, 90, 200), (False, True, False, True))
    one, two = choices(trace, trials=(1, 2, 8), caps=(None,))
    assert (one.accuracy, one.trials, two.trials) == (0.5, 1, 2) and two.accuracy == pytest.approx(1 - 1 / 6)
    assert two.cost == pytest.approx(
        sum(decode_cost(SMALL, prompt=100, output=n, trials=2).total for n in trace.lengths) / 4
    )
    (capped,) = choices(trace, trials=(1,), caps=(60,))
    assert capped.accuracy == 0.25, "the right answer after 200 tokens is not reached"
    assert capped.cost == pytest.approx(
        sum(decode_cost(SMALL, prompt=100, output=n).total for n in (10, 50, 60, 60)) / 4
    )


def test_the_larger_model_wins_where_memory_counts_and_loses_under_the_older_law():
    """The small model needs twice the tokens of the large one: memory makes it the dearer one, arithmetic alone the cheaper."""
    pair = [Trace("q", SMALL, DENSE, 128, (32768,), (True,)), Trace("q", LARGE, DENSE, 128, (16384,), (True,))]
    assert envelope(by_question(pair)["q"])[0].model == LARGE.name
    assert envelope(by_question(pair, intensity=0.0)["q"])[0].model == SMALL.name


def test_a_common_choice_must_exist_for_every_question():
    few = [Trace("a", SMALL, DENSE, 1, (5, 5), (True, False)), Trace("b", SMALL, DENSE, 1, (5,), (True,))]
    (only,) = common_choices(by_question(few))
    assert only.trials == 1 and only.accuracy == 0.75


@given(
    st.floats(1e9, 1e17), st.integers(1, 32), st.sampled_from([DENSE, TOP, Method("block_topk", block=16, blocks=16)])
)
def test_what_a_limit_buys_is_the_longest_that_it_pays(limit, trials, method):
    def cost(n: int) -> float:
        return decode_cost(LARGE, method, prompt=300, output=n, trials=trials).total

    n = affordable(LARGE, method, limit=limit, prompt=300, trials=trials)
    assert (n == 0 or cost(n) <= limit) and cost(n + 1) > limit


def test_costs_are_spaced_evenly():
    assert log_spaced(1, 100, 3) == [1, pytest.approx(10), 100]


GOOD = {"question": "q", "model": "qwen3-8b", "prompt": 9, "lengths": [5], "correct": [True]}


def test_traces_are_read(tmp_path):
    file = tmp_path / "t.json"
    file.write_text(json.dumps([GOOD, {**GOOD, "budget": 64}, {**GOOD, "block": 16, "blocks": 4}]))
    found = read_traces(file)
    assert [t.method for t in found] == [DENSE, Method("topk", budget=64), Method("block_topk", block=16, blocks=4)]
    assert found[0] == Trace("q", LARGE, DENSE, 9, (5,), (True,))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ([], DataError, "at least one trace"),
        ({}, DataError, "at least one trace"),
        ([GOOD, {"question": "x"}], DataError, "entry 1: has"),
        ([{**GOOD, "sum": 1}], DataError, "entry 0: has"),
        ([{**GOOD, "model": "qwen3-8"}], ConfigError, "Did you mean 'qwen3-8b'"),
        ([{**GOOD, "model": 8}], ConfigError, "entry 0: model is '8'"),
        ([{**GOOD, "lengths": [0]}], ConfigError, "lengths is 0"),
        ([{**GOOD, "lengths": ["5"]}], DataError, "whole numbers"),
        ([{**GOOD, "lengths": 5}], DataError, "whole numbers"),
        ([{**GOOD, "correct": [1]}], DataError, "true and false"),
        ([{**GOOD, "lengths": [5, 6]}], ConfigError, "2 lengths and 1 verdicts"),
        ([{**GOOD, "budget": 64, "block": 16}], DataError, "one or the other"),
        ([{**GOOD, "block": 16}], ConfigError, "blocks is 0"),
    ],
)
def test_bad_traces_are_named(tmp_path, content, error, message):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        read_traces(file)


def test_other_bad_input(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_traces(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="k=3, correct=1, trials=2"):
        coverage(2, 1, 3)
    with pytest.raises(ConfigError, match="no questions"):
        oracle_accuracy({}, [1.0])
    with pytest.raises(ConfigError, match="0 < low"):
        log_spaced(0, 1)
    with pytest.raises(ConfigError, match="limit is -1"):
        affordable(SMALL, limit=-1, prompt=1)
