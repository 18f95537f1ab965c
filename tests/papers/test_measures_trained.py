"""Measures that train a small model: tiny runs of each say what they counted, and their arithmetic is exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.data.synthetic import key_values
from foveal.papers.cards import load_card
from foveal.papers.measures import (
    clear_distilled,
    dhsa_accuracy,
    hylra,
    painter,
    recall,
    rettention_digits,
    routing_copy,
    sparsed,
    vmoba_training,
)
from foveal.papers.measures.results import sign_test, summary
from foveal.patterns import MoBA, VMoBA

CACHED = (
    recall.diffusion_model, recall.causal_model, sparsed.compared, sparsed.overlaps, painter.digit_model,
    rettention_digits.painted, clear_distilled.teacher_of,
)  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"DIM": 16, "DEPTH": 2, "HEADS": 2, "LENGTH": 48, "ANSWER": 8, "PAIRS": 4, "ASKED": 4}.items():
        monkeypatch.setattr(recall, name, value)
    monkeypatch.setattr(recall, "STAGES", (recall.Stage(2, 2, 9, 64), recall.Stage(1, 4, 48, 96)))
    for name, value in {"ROWS": 2, "STEPS": 8, "BLOCK": 4, "SINKS": 2}.items():
        monkeypatch.setattr(sparsed, name, value)
    method = replace(sparsed.METHOD, steps=8, generated=8, block=4)
    monkeypatch.setattr(sparsed, "METHOD", method)
    monkeypatch.setattr(sparsed, "JOINT", replace(method, generated=0))
    monkeypatch.setattr(sparsed, "EARLY", replace(method, skip=0.0))
    monkeypatch.setattr(dhsa_accuracy, "ROWS", 2)
    for module in (painter, clear_distilled, vmoba_training):
        for name, value in {"DIM": 16, "DEPTH": 2, "HEADS": 2, "BATCH": 2}.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(painter, "TRAINING_STEPS", 2)
    monkeypatch.setattr(rettention_digits, "PICTURES", 2)
    monkeypatch.setattr(rettention_digits, "STEPS", 12)
    monkeypatch.setattr(rettention_digits, "KEEPS", (1 / 32,))
    for name, value in {"TEACHER_STEPS": 2, "STEPS": 2, "PAINTED": 4, "FRESH": 4}.items():
        monkeypatch.setattr(clear_distilled, name, value)
    for name, value in {"STEPS": 1, "FRESH": 2}.items():
        monkeypatch.setattr(vmoba_training, name, value)
    monkeypatch.setattr(routing_copy, "STAGES", ((1, 56, 2, 40, 112), (1, 64, 3, 40, 128)))
    monkeypatch.setattr(routing_copy, "ROWS", 2)
    for cached in CACHED:
        cached.cache_clear()
    yield
    for cached in CACHED:
        cached.cache_clear()


def checked(result: dict, slug: str, measured_by: str, out: Path) -> dict:
    """The result is on disk and belongs to the claim that names the function."""
    claim = next(c for c in load_card(slug).claims if c.measured_by == f"foveal.papers.measures.{measured_by}")
    assert json.loads((out / slug / f"{claim.id}.json").read_text()) == result
    assert result["claim"] == claim.id and result["measured"]["ours"] and result["measured"]["seeds"]
    return result["measured"]


def test_spread_and_sign_test() -> None:
    assert summary([1.0, 3.0]) == {"mean": 2.0, "spread": 1.41421} and summary([1.0])["spread"] == 0.0
    assert sign_test([0.1, 0.2, 0.0, 0.3, 0.1, 0.4]) == {"positive": 5, "negative": 0, "p": 0.0625}
    assert sign_test([0.1, -0.1])["p"] == 1.0 and sign_test([0.0])["p"] == 1.0


def test_a_curriculum_ends_with_what_is_measured() -> None:
    stages = recall.STAGES
    assert [recall.stage_of(step, stages) for step in (0, 1, 2, 3, 99)] == [stages[0], stages[0], *[stages[1]] * 3]
    task = recall.batch(stages[1], torch.Generator().manual_seed(0))
    assert task.ids.shape == recall.held_out(2, 0).ids.shape == (2, recall.LENGTH)
    assert not torch.equal(recall.held_out(2, 0).ids, recall.held_out(2, 1).ids)
    assert bool(recall.held_out(2, 0).answer[:, -recall.ANSWER + 1 :: 2].all())


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("density", [0.1, 0.33, 0.9])
def test_the_window_of_a_density_is_the_smallest(sinks: int, density: float) -> None:
    base = BaseMask.build(recall.LENGTH, recall.LENGTH, causal=False)
    none = torch.empty(1, 1, 0, 4)
    found = sparsed.window(density, sinks)

    def dense(window) -> float:
        return measure(window.select(none, none, SelectContext(base))[0], base, 1, 1).density

    assert dense(found) >= density
    assert found.window == 1 or dense(replace(found, window=found.window - 1)) < density


def test_overlap_of_masks() -> None:
    a = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [0, 0]]], dtype=torch.bool)
    b = torch.tensor([[[1, 0], [1, 0]], [[1, 0], [0, 0]]], dtype=torch.bool)
    assert sparsed.jaccard(a, b) == pytest.approx((1 / 3 + 1) / 2) and sparsed.jaccard(a, a) == 1.0


def test_sparsed(tmp_path: Path) -> None:
    seen = checked(sparsed.measure_accuracy(seeds=1, out=tmp_path), "sparsed", "sparsed:measure_accuracy", tmp_path)
    assert seen["density"]["dense"] == 1.0 and seen["density"]["sliding window"] >= seen["density"]["sparsed"] > 0
    assert seen["answers_per_seed"] == 2 * 4
    seen = checked(sparsed.measure_stability(seeds=2, out=tmp_path), "sparsed", "sparsed:measure_stability", tmp_path)
    assert 0 < seen["jaccard"]["heads"]["mean"] <= 1 and len(seen["accuracy"]) == 3


def test_answers_are_scored_against_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always copies the truth finds everything; one that always says token 0 finds nothing."""
    model, truth = recall.diffusion_model(0), recall.held_out(2, 0)

    def told(ids: torch.Tensor, policy=None, *, run=None) -> torch.Tensor:
        return torch.nn.functional.one_hot(truth.ids, model.vocab_size).float()

    monkeypatch.setattr(sparsed, "measure", lambda *a: type("D", (), {"density": 1.0}))
    monkeypatch.setattr(model, "forward", told)
    with pytest.raises(Exception, match="mean requires"):  # no layer ran: there is no density to report
        sparsed.answers(0, sparsed.METHOD)
    monkeypatch.setattr(sparsed, "fmean", lambda x: 0.0)
    assert sparsed.answers(0, sparsed.METHOD).accuracy == 1.0
    monkeypatch.setattr(model, "forward", lambda ids, policy=None, *, run=None: -told(ids).cumsum(-1))
    assert sparsed.answers(0, sparsed.METHOD).accuracy == 0.0


def test_dhsa(tmp_path: Path) -> None:
    result = dhsa_accuracy.measure_accuracy(seeds=1, out=tmp_path)
    seen = checked(result, "dhsa", "dhsa_accuracy:measure_accuracy", tmp_path)
    for row in seen["budgets"].values():
        assert set(row) == {"dhsa vsb", "dhsa chunks", "block-sparse", "window"}
    assert result["verdict"] == "not reproduced", "an untrained model has not learnt the task"


def test_rettention(tmp_path: Path) -> None:
    result = rettention_digits.measure_ramp(seeds=1, out=tmp_path)
    seen = checked(result, "rettention", "rettention_digits:measure_ramp", tmp_path)["psnr"]["1/32"]
    assert {"band only", "plain", "ratio", "residual", "reshape λ=auto", "mean ratio"} <= set(seen)
    assert 0 < seen["mean ratio"]["mean"] < 1
    good = {"1/8": {"plain": {"mean": 10.0}, "residual": {"mean": 20.0}, "reshape λ=0.0": {"mean": 19.8}}}
    assert rettention_digits.criterion(good) == (True, False), "a little below residual is within the criterion"
    good["1/8"]["reshape λ=0.0"]["mean"] = 20.5
    assert rettention_digits.criterion(good) == (True, True)
    good["1/8"]["plain"]["mean"] = 15.0
    assert rettention_digits.criterion(good) == (False, True)


def test_psnr() -> None:
    x = torch.zeros(1, 1, 4, 4)
    assert float(painter.psnr(x, x + 0.2)) == pytest.approx(20.0, abs=1e-4)


def test_clear(tmp_path: Path) -> None:
    result = clear_distilled.measure_losses(seeds=1, out=tmp_path)
    seen = checked(result, "clear", "clear_distilled:measure_losses", tmp_path)
    run = seen["runs"][0]
    assert seen["full_over_no_tuning"]["mean"] == pytest.approx(
        run["own + prediction + attention"] / run["no tuning"], rel=1e-2
    )


def test_vmoba(tmp_path: Path) -> None:
    seen = checked(
        vmoba_training.measure_training(seeds=1, out=tmp_path), "vmoba", "vmoba_training:measure_training", tmp_path
    )
    assert seen["density"]["full"] == 1.0 and seen["density"]["moba"] == 0.25 and seen["tokens"] == 512
    assert isinstance(vmoba_training.METHODS["moba"], MoBA) and isinstance(vmoba_training.METHODS["vmoba"], VMoBA)
    assert seen["criterion_met"]["near full"] == (seen["loss"]["vmoba"]["mean"] <= 1.05 * seen["loss"]["full"]["mean"])


def test_routing(tmp_path: Path) -> None:
    result = routing_copy.measure_copy(seeds=2, out=tmp_path)
    seen = checked(result, "routing", "routing_copy:measure_copy", tmp_path)
    assert seen["parameters"]["hybrid"] <= seen["parameters"]["local"] and set(seen["loss"]) == {"hybrid", "local"}
    assert [routing_copy.text(step, torch.Generator()).ids.shape[1] for step in (0, 1, 9)] == [56, 64, 64]


def test_retrieval_of_the_measured_length_asks_what_it_tells() -> None:
    task = key_values(1, recall.PAIRS, recall.ASKED, torch.Generator(), length=recall.LENGTH)
    assert int(task.answer.sum()) == recall.ASKED


def test_hylra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROMPT": 5, "DECODED": 6, "BUDGETS": (3, 8)}.items():
        monkeypatch.setattr(hylra, name, value)
    result = hylra.measure_keys(out=tmp_path)
    claim = next(c for c in load_card("hylra").claims if c.measured_by == "foveal.papers.measures.hylra:measure_keys")
    assert json.loads((tmp_path / "hylra" / f"{claim.id}.json").read_text()) == result
    assert result["verdict"] == "reproduced" and result["measured"]["keys"]["8"] == [51, 45, 45, 45, 45, 45]
    monkeypatch.setattr(hylra, "formula", lambda budget, role: 1)
    assert hylra.measure_keys(out=tmp_path)["verdict"] == "not reproduced"
