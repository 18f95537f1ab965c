"""Flux's measures at toy size: what they score is what the model does, and who wins is judged at equal cost."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from foveal.models import DecoderLM, shifted_factory
from foveal.papers.measures import flux as measures
from foveal.papers.measures.flux import Scores, best_static, scores, static_policies
from foveal.patterns import Dense, SlidingWindow
from foveal.policies import Policy
from foveal.recipes.flux_tasks import synthetic_tasks


def test_scores_are_those_of_one_forward():
    model = DecoderLM(130, 16, 2, 4, attention=shifted_factory(16, 4), seed=0).eval()
    tasks = synthetic_tasks(40, 6, 2, measures.table(0))
    got = scores(model, Policy.uniform(SlidingWindow(8)), tasks, 5, 0)
    batch = tasks[0].draw(5, torch.Generator().manual_seed(1_000_003))
    with torch.no_grad():
        right = model(batch.ids[:, :-1], SlidingWindow(8)).argmax(-1) == batch.ids[:, 1:]
    assert got.accuracy == pytest.approx(float(right[batch.scored[:, 1:]].double().mean()))
    assert got.sparse == (1.0, 1.0) and got.cost == 0.0
    pairs = sum(min(i + 1, 8) for i in range(39)) / sum(range(1, 40))
    assert got.attended == pytest.approx(pairs)
    dense = scores(model, Policy.uniform(Dense()), tasks, 5, 0)
    assert dense.attended == 1.0 and dense.sparse == (0.0, 0.0)


def test_static_assignments_are_all_of_them():
    made = static_policies(3, SlidingWindow(8))
    assert len(made) == len({p.layers for p in made}) == 8
    assert all(isinstance(made[0].rule(i).prefill, Dense) for i in range(3))


def test_the_best_static_assignment_costs_no_more():
    def of(accuracy, full):
        return Scores(accuracy, 1.0, (1 - full, 1 - full), 1.0)

    found = {"routed": Scores(0.9, 1.0, (0.4, 1.0), 0.5), "static": [of(0.99, 3 / 6), of(0.95, 2 / 6), of(0.7, 1 / 6), of(0.8, 1 / 6)]}  # fmt: skip
    equal, dearer = best_static(found)
    assert (equal.accuracy, dearer.accuracy) == (0.8, 0.95)


@pytest.mark.parametrize(("accuracy", "gap", "static", "verdicts"), [
    (0.97, 0.6, 0.9, ("reproduced", "reproduced")), (0.97, 0.1, 0.99, ("direction holds", "not reproduced")),
    (0.5, 0.6, 0.4, ("not reproduced", "not reproduced")),
])  # fmt: skip
def test_verdicts(tmp_path, monkeypatch, accuracy, gap, static, verdicts):
    made = {
        "dense": Scores(accuracy, 1.0, (0.0, 0.0), 1.0), "routed": Scores(accuracy, 1.0, (0.4, 0.4 + gap), 0.5),
        "static": [Scores(static, 1.0, (1.0, 1.0), 0.4)], "history": [],
    }  # fmt: skip
    monkeypatch.setattr(measures, "experiment", lambda seed: made)
    got = (measures.measure_separation(out=tmp_path), measures.measure_static(out=tmp_path))
    assert tuple(r["verdict"] for r in got) == verdicts
    assert json.loads((tmp_path / "flux" / "input-dependent-ratio.json").read_text())["measured"]["targets"] == [
        0.4,
        1.0,
    ]


def test_the_whole_experiment_runs_at_toy_size(monkeypatch):
    for name, value in {"LENGTH": 48, "PAIRS": 6, "ASKED": 2, "DEPTH": 2, "DIM": 16}.items():
        monkeypatch.setattr(measures, name, value)
    how = replace(measures.ROUTING, steps=3, rows=2, pool=4, sparse=SlidingWindow(8))
    got = measures.experiment(11, (measures.Stage(2, 4, 17, 64),), how, 4)
    assert len(got["static"]) == 4 and len(got["history"]) == 3
    assert got["dense"].sparse == (0.0, 0.0) and 0 < got["routed"].attended <= 1
