"""Titans' claims: the tasks ask for what they say, verdicts follow from the numbers, and result files are what the card reads."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.data.synthetic import FIRST, SEPARATOR
from foveal.papers.cards import load_card
from foveal.papers.measures import titans


@pytest.fixture
def short(monkeypatch):
    for name, value in {"SEEDS": 1, "TESTED": 2, "BATCH": 2, "SHORT": 24, "LONG": 48}.items():
        monkeypatch.setattr(titans, name, value)
    monkeypatch.setattr(titans, "_train_step", lambda impl, seed: None)
    titans.trained.cache_clear()
    yield
    titans.trained.cache_clear()


def test_only_the_last_value_of_a_key_counts():
    task = titans.overwriting(50, torch.Generator().manual_seed(0))
    for ids, answer in zip(task.ids.tolist(), task.answer.tolist(), strict=True):
        end = ids.index(SEPARATOR)
        assert end == 16 and len(ids) == 25
        last: dict[int, int] = {}
        for key, value in zip(ids[0:end:2], ids[1:end:2], strict=True):
            assert FIRST <= key < FIRST + 4 and value >= FIRST + titans.KEYS
            last[key] = value
        asked = list(zip(ids[end + 1 :: 2], ids[end + 2 :: 2], strict=True))
        assert len(last) == 4 and dict(asked) == last and len(asked) == 4
        assert [i for i, a in enumerate(answer) if a] == list(range(end + 2, 25, 2))


def test_every_variant_differs_from_the_full_memory_in_one_thing():
    sizes = {
        n: titans.model_of(40, 0, **v).get_submodule("layers.0.attention.layer.memory")
        for n, v in titans.VARIANTS.items()
    }
    full = sizes["full"]
    assert len(full.initial) == 2 and full.conv is not None and full.momentum and full.decay
    assert len(sizes["linear memory"].initial) == 1 and sizes["no convolution"].conv is None
    assert not sizes["no momentum"].momentum and not sizes["no decay"].decay


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        ("measure_ablation", {"steps": 2}),
        ("measure_time", {"steps": 2, "repeats": 1}),
        ("measure_dual", {"repeats": 1}),
    ],
)
def test_results_have_a_verdict_and_their_provenance(measure, options, short, tmp_path):
    result = getattr(titans, measure)(**options, seed=7, out=tmp_path)
    claim = next(c for c in load_card("titans").claims if c.measured_by == f"foveal.papers.measures.titans:{measure}")
    assert json.loads((tmp_path / "titans" / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["seed"] == 7 and result["verdict"]


@pytest.mark.parametrize(
    ("ablated", "errors", "verdict"),
    [
        ((0.5, 0.5, 0.5, 0.5), (0.1, 0.2), "reproduced"),
        ((0.9, 0.5, 0.5, 0.5), (0.1, 0.2), "direction holds"),
        ((0.9, 0.9, 0.9, 0.9), (0.2, 0.2), "not reproduced"),
        ((0.95, 0.5, 0.5, 0.5), (0.1, 0.2), "not reproduced"),
    ],
)
def test_verdicts_of_the_ablation_follow_from_the_criteria(ablated, errors, verdict, monkeypatch, tmp_path):
    accuracy = dict(zip(titans.VARIANTS, (0.9, *ablated), strict=True))
    wrong = dict(zip(("full", "no decay"), errors, strict=True))
    monkeypatch.setattr(titans, "trained", lambda t, n, s, k: accuracy[n] if t == "recall" else 1 - wrong[n])
    assert titans.measure_ablation(out=tmp_path)["verdict"] == verdict
