"""Sparse budgets on real models: a tiny model in their place, and the verdict from planted answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from foveal.data.sums import sums
from foveal.hf.load import LoadedModel, load_model
from foveal.papers.cards import load_card
from foveal.papers.measures import kinetics_models as measure
from foveal.policies.kinetics import DENSE, Method, ModelShape
from foveal.policies.kinetics_allocation import Trace
from tests.papers.planted import stored
from tests.tune.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, device="cpu")


def test_the_shape_is_the_models(loaded: LoadedModel) -> None:
    shape = measure.shape_of(loaded)
    assert (shape.layers, shape.num_heads, shape.num_kv_heads, shape.head_dim) == (2, 4, 2, 8)
    assert shape.parameters == sum(p.numel() for p in loaded.model.parameters())


def test_a_budget_for_everything_samples_what_dense_samples(loaded: LoadedModel) -> None:
    ids = torch.arange(20)[None] + 1

    def rows(method: Method, seed: int = 0) -> list[list[int]]:
        found, ended = measure.sampled(loaded, ids, method, trials=8, tokens=300, seed=seed)
        assert ended == [row[-1] == 0 for row in found]
        return found

    dense = rows(DENSE)
    assert len(dense) == 8 and {len(row) for row in dense} > {300}, "some end before"
    assert all(0 not in row[:-1] and (row[-1] == 0 or len(row) == 300) for row in dense), "the end token is the last"
    assert rows(Method("topk", budget=4096)) == dense
    assert rows(Method("topk", budget=1)) != dense != rows(DENSE, 1)
    assert loaded.model.config._attn_implementation != "foveal"


def test_answers_are_read_where_they_stand(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = sums(1, 2, torch.Generator().manual_seed(0))
    texts = [f"Answer: {one.answer}", "Answer: 5", f"Answer: 5 Answer: {one.answer}", f"The answer is {one.answer}, or"]
    rows, ended = [[*loaded.tokenizer(text).input_ids, 0] for text in texts], [True, True, True, False]
    monkeypatch.setattr(measure, "sampled", lambda *_, **__: (rows, ended))
    trace, cut = measure.answered(loaded, one, measure.shape_of(loaded), DENSE, "2/0", trials=4, tokens=40, seed=0)
    assert trace.correct == (True, False, True, False), "what is cut off in the middle is wrong"
    assert trace.lengths == tuple(map(len, rows)) and cut == 1
    assert trace.prompt == len(loaded.tokenizer(one.question).input_ids)


def test_the_result_is_what_the_card_reads(folder: Path, tmp_path: Path) -> None:
    result = measure.measure_quality(
        out=tmp_path,
        models=(str(folder),),
        device="cpu",
        budgets=(4, 16),
        terms=(3, 4),
        questions=1,
        trials=2,
        tokens=12,
    )
    claim = next(c for c in load_card("kinetics").claims if c.id == "sparse-quality-real-models")
    assert claim.measured_by == "foveal.papers.measures.kinetics_models:measure_quality"
    assert stored(tmp_path, result) and result["verdict"] == "not reproduced", "random weights answer nothing"
    (row,) = result["measured"]["models"].values()
    assert set(row["coverage"]) == set(row["teflops"]) == {"dense", "top-k 4", "top-k 16"}
    assert row["teflops"]["dense"][1] > row["teflops"]["top-k 16"][1] > row["teflops"]["top-k 4"][1]


SHAPE = ModelShape("tiny", 1000, 2, 4, 2, 8)


def planted(dense: int, small: int, large: int) -> dict[str, Any]:
    """Right answers of 16 by method."""
    methods = {DENSE: dense, Method("topk", budget=8): small, Method("topk", budget=32): large}
    traces = [Trace("q", SHAPE, m, 10, (400,) * 16, tuple(i < n for i in range(16))) for m, n in methods.items()]
    return measure.compared(traces)


def test_comparison_and_verdict() -> None:
    best = planted(8, 0, 8)
    assert best["largest_loss"] == 0.0 and best["lead_at_lowest_cost"] > 0.4, "cheap answers may be many"
    assert best["dense_best"] == best["coverage"]["top-k 32"][16] == 1.0
    assert measure.judge({"a": best}) == "reproduced"
    cheap = planted(8, 6, 0)
    assert cheap["largest_loss"] == pytest.approx(17 / 120), "of two answers: 1 − 8·7/(16·15) against 1 − 10·9/(16·15)"
    assert cheap["lead_at_lowest_cost"] > measure.GAIN
    assert measure.judge({"a": cheap}) == measure.judge({"a": best, "b": cheap}) == "direction holds"
    assert measure.judge({"a": planted(8, 0, 0)}) == "not reproduced"
    assert measure.judge({"a": planted(0, 0, 0)}) == "not reproduced", "a model that cannot do it proves nothing"
