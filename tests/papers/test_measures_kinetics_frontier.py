"""The sparse frontier: what is sampled and counted is what is said, and the verdict follows from the frontiers."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.data.chains import chains, vocabulary
from foveal.models import DecoderLM, shifted_factory
from foveal.papers.cards import load_card
from foveal.papers.measures import kinetics_frontier as measure
from foveal.policies.kinetics import DENSE, Method, ModelShape
from foveal.policies.kinetics_allocation import Trace, choices

SHAPE = ModelShape("tiny", 1000, 2, 4, 2, 8)


@pytest.fixture
def model() -> DecoderLM:
    """A random one."""
    size = vocabulary(measure.MODULUS, measure.MOST)
    return DecoderLM(size, 32, 2, 4, 2, attention=shifted_factory(32, 4, 2), seed=3).eval()


def trace(method: Method, correct: int, question: str = "8/0", name: str = "tiny") -> Trace:
    shape = ModelShape(name, 1000, 2, 4, 2, 8)
    return Trace(question, shape, method, 18, (24,) * 4, tuple(i < correct for i in range(4)))


@pytest.mark.parametrize("method", [*measure.SPARSE, *measure.BLOCKS])
def test_a_step_reads_at_most_the_keys_that_it_is_charged_for(model, method):
    task = chains(3, 20, torch.Generator().manual_seed(0), modulus=measure.MODULUS, most=measure.MOST)
    memory = measure.Memory()
    how = measure.policy(method)
    model(task.question, how, memory)
    run = model.begin(task.ids[:, task.prompt : task.prompt + 1], how, memory, measuring=True)
    model(task.ids[:, task.prompt : task.prompt + 1], run=run)
    for density in run.densities.values():
        keys = density.pairs / (density.allowed / (task.prompt + 1))
        assert keys <= method.keys and (method.kind != "topk" or keys == method.keys)


def test_sampling_with_a_budget_for_everything_is_dense_sampling(model):
    """The same random numbers, so the same tokens; another seed gives others."""
    task = chains(5, 3, torch.Generator().manual_seed(0), modulus=measure.MODULUS, most=measure.MOST)

    def drawn(method: Method, seed: int) -> torch.Tensor:
        return measure.sampled(model, task.question, 9, measure.policy(method), torch.Generator().manual_seed(seed))

    dense = drawn(DENSE, 1)
    assert dense.shape == (5, 9) and torch.equal(dense, drawn(Method("topk", budget=64), 1))
    assert not torch.equal(dense, drawn(DENSE, 2)) and not torch.equal(dense, drawn(Method("topk", budget=2), 1))


def test_frontiers_use_the_cheapest_way_to_an_accuracy():
    small = Method("topk", budget=8)
    dense, sparse = [trace(DENSE, 2)], [trace(small, 2)]
    for way in measure.WAYS:
        limits = measure.cost_points(dense, way)
        assert limits[0] == choices(dense[0])[0].cost and len(limits) == 100
        curve = measure.frontier(dense, way, limits)
        assert curve[0] == 0.5 and curve[-1] == 1.0 and curve == sorted(curve)
        less = choices(sparse[0])[0].cost
        assert measure.frontier(sparse, way, [less]) == [0.5] and less < limits[0], "eight keys cost less"
        assert measure.frontier(dense, way, [less]) == [0.0]
    assert measure.cheaper(sparse, dense) > 1 and measure.cheaper([trace(small, 0)], dense) is None


def test_comparison_leaves_out_costs_at_which_nobody_has_anything():
    found = measure.compared([0.0, 0.4, 0.5, 0.6, 0.6], [0.0, 0.0, 0.5, 0.7, 0.5])
    assert found == {"at_least": 0.75, "above": 0.5, "largest_lead": 0.4, "largest_lag": pytest.approx(0.1)}
    assert measure.compared([0.0], [0.0])["at_least"] == 0.0


def test_owners_are_the_models_of_the_best_choices():
    found = [trace(DENSE, 1, name="small"), trace(DENSE, 0, name="other")]
    assert measure.owners(found) == {"small": 1.0}


@pytest.mark.parametrize(
    ("oracle", "common", "dense", "verdict"),
    [
        (0.9, 0.8, 0.5, "reproduced"),
        (0.9, 0.79, 0.5, "direction holds"),
        (0.7, 0.7, 0.5, "not reproduced"),
        (1.0, 1.0, 0.1, "not reproduced"),
    ],
)
def test_the_verdict_follows_from_the_shares(oracle, common, dense, verdict):
    run = {"topk": {"oracle": {"at_least": oracle}, "common": {"at_least": common}}, "best_dense": dense}
    assert measure.judge([run]) == verdict
    good = {"topk": {"oracle": {"at_least": 1.0}, "common": {"at_least": 1.0}}, "best_dense": 0.9}
    assert measure.judge([good, run]) == verdict, "every seed has to meet it"


def test_the_result_is_what_the_card_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "WIDTHS", {"a": 16, "b": 32})
    monkeypatch.setattr(measure, "STAGES", ((2, 4), (1, 6)))
    monkeypatch.setattr(measure, "QUESTIONS", {2: 2, 3: 1})
    monkeypatch.setattr(measure, "TRIALS", 2)
    monkeypatch.setattr(measure, "ROWS", 3)
    result = measure.measure_frontier(seeds=1, seed=7, out=tmp_path)
    claim = next(c for c in load_card("kinetics").claims if c.id == "sparse-frontier")
    assert claim.measured_by == "foveal.papers.measures.kinetics_frontier:measure_frontier"
    assert json.loads((tmp_path / "kinetics" / "sparse-frontier.json").read_text()) == result
    (run,) = result["measured"]["runs"]
    assert result["verdict"] == "not reproduced" and run["best_dense"] < measure.CAPABLE, "three steps teach nothing"
    assert set(run["single_trial"]) == {f"{n}, {m}" for n in "ab" for m in (DENSE, *measure.SPARSE, *measure.BLOCKS)}
    curves = [run["frontiers"][kind][way] for kind in ("dense", "topk", "block_topk") for way in measure.WAYS]
    assert all(len(curve) == 100 for curve in curves)
