"""Search methods side by side: one run, one text, one limit; routers are candidates; who wins and by how much."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from foveal.core.budget import Budget
from foveal.core.errors import ConfigError
from foveal.hf.load import load_model
from foveal.layers.layer_router import LayerRouters
from foveal.patterns import BlockTopK, Dense, SlidingWindow
from foveal.policies import Policy
from foveal.tune import TuneOptions, run_tune
from foveal.tune.methods import as_candidates, flux_candidate, methods_table, side_by_side
from foveal.tune.plots import pareto
from tests.tune.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), layers=3)


@pytest.fixture(scope="module")
def router(folder, tmp_path_factory):
    """Routers of the tiny model that send its last layer to the sparse branch."""
    routers = LayerRouters(3, 8, pool=8)
    routers.layers[2].get_parameter("V3.bias").data[1] = -4.5
    file = tmp_path_factory.mktemp("router") / "mine.safetensors"
    branches = {"sparse": json.dumps(SlidingWindow(64, 4).to_json()), "full": json.dumps(Dense().to_json())}
    routers.save(file, model=load_model(folder).fingerprint, **branches)
    return file


def test_all_methods_in_one_run(folder, router, tmp_path, monkeypatch):
    listed = [("block top-k", BlockTopK(budget=Budget(density=0.5)))]
    monkeypatch.setattr("foveal.tune.candidates.patterns", lambda context: listed)
    monkeypatch.setattr("foveal.tune.run.layer_options", lambda context: [Dense(), SlidingWindow(256, 4)])
    given = {"model": str(folder), "context": 512, "out": str(tmp_path / "out"), "decode_tokens": 8, "impl": "gather", "max_ppl_increase": 0.5}  # fmt: skip
    first = run_tune(TuneOptions(**given))
    lines = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    ticks: list[tuple[int, int]] = []
    results = run_tune(
        TuneOptions(**given, method="all", router=str(router)),
        report=lambda what, done, total: ticks.append((done, total)),
    )
    after = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    assert after[: len(lines)] == lines and len(after) > len(lines), "what was measured is kept and goes on"
    assert ticks[-1][0] <= ticks[-1][1] and [d for d, _ in ticks] == sorted(d for d, _ in ticks)
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["search"] == first["search"] and stored["hylra"] is not None
    methods = {c["method"] for c in stored["candidates"]}
    assert {"dense", "uniform", "hylra", "control", "flux"} <= methods
    assert {r["method"] for r in stored["methods"]["rows"]} == {"uniform", "greedy", "hylra", "flux"}
    (flux,) = (c for c in stored["candidates"] if c["method"] == "flux")
    assert 0.5 < flux["density"] < 0.99 and 0.5 < flux["decode_density"] < 0.99, "two layers of three are full"
    html = (tmp_path / "out" / "report.html").read_text()
    assert "Methods side by side" in html and results["methods"]["said"].split(";")[0][:20] in html
    assert methods_table(results).row_count == 4


def test_a_chosen_router_lies_beside_the_policy(folder, router, tmp_path, monkeypatch):
    def only_flux_is_fast(rows, baseline, limit, informative):
        for r in rows:
            r["verdict"], r["why"] = "allowed", ""
        name = next(r["name"] for r in rows if r["method"] == "flux")
        return name, "for the test"

    monkeypatch.setattr("foveal.tune.run.judge", only_flux_is_fast)
    monkeypatch.setattr("foveal.tune.candidates.patterns", lambda context: [])
    run_tune(TuneOptions(model=str(folder), context=256, out=str(tmp_path / "a"), decode_tokens=4, impl="gather", method="flux", router=str(router)))  # fmt: skip
    shutil.move(tmp_path / "a", tmp_path / "b")
    text = (tmp_path / "b" / "policy.json").read_text()
    assert json.loads(text)["default"]["prefill"]["router"] == "router.safetensors" and str(tmp_path) not in text
    policy = Policy.load(tmp_path / "b" / "policy.json")
    import foveal

    model = load_model(folder).model
    with torch.no_grad(), foveal.attach(model, policy) as handle:
        model(input_ids=torch.arange(100)[None])
        assert handle.decisions().full[:, 0].tolist() == [True, True, False]


def row(name, method, speed, loss, verdict="allowed"):
    return {"name": name, "method": method, "prefill_speedup": speed, "ppl_increase": loss, "decode_ppl_increase": loss, "verdict": verdict}  # fmt: skip


DENSE = row("dense", "dense", 1.0, 0.0)
OVER = "over the loss limit"


def test_the_fastest_within_the_limits_wins():
    rows = [
        DENSE, row("w", "uniform", 1.5, 0.008), row("v", "uniform", 3.0, 0.2, OVER), row("p", "greedy", 1.8, 0.009, "chosen"),
        row("h", "hylra", 2.5, 0.07, OVER), row("even", "control", 9.0, 0.0),
    ]  # fmt: skip
    got = side_by_side(rows, ("greedy", "hylra", "flux"), 0.01)
    assert [(r["method"], r["name"]) for r in got["rows"]] == [
        ("greedy", "p"),
        ("uniform", "w"),
        ("flux", "dense"),
        ("hylra", "h"),
    ]
    assert got["winner"] == "greedy" and got["runner_up"] == "uniform" and got["margin"] == pytest.approx(0.2)
    assert got["said"].startswith("greedy wins with p: 1.80× dense at +0.90 % perplexity, 20% faster than uniform")
    assert [r["within"] for r in got["rows"]] == [True, True, True, False]


def test_nobody_wins_when_nothing_beats_dense():
    slow = row("w", "uniform", 0.9, 0.0, "slower than dense")
    got = side_by_side([DENSE, slow, row("h", "hylra", 4.0, 0.3, OVER)], ("greedy", "hylra"), 0.01)
    assert got["winner"] is None and got["margin"] is None and "No method" in got["said"]
    alone = side_by_side([DENSE, row("h", "hylra", 4.0, 0.001), row("u", "uniform", 2.0, 0.5, OVER)], ("hylra",), 0.01)
    assert alone["winner"] == "hylra" and alone["runner_up"] is None and "no other method" in alone["said"]


def test_the_plot_has_one_mark_per_method():
    rows = [
        DENSE,
        row("w", "uniform", 1.5, 0.008),
        row("p", "greedy", 1.8, 0.009, "chosen"),
        row("h", "hylra", 2.5, 0.07, OVER),
    ]
    results = {"candidates": rows, "baseline": {"name": "sdpa"}, "max_ppl_increase": 0.01, "chosen": "p"}
    assert as_candidates(results) is None
    results["methods"] = side_by_side(rows, ("greedy", "hylra"), 0.01)
    plot = pareto(as_candidates(results))
    assert {(m.name, m.kind) for m in plot.marks} == {
        ("uniform", "allowed"),
        ("greedy", "chosen"),
        ("hylra", "over"),
        ("sdpa", "baseline"),
    }
    assert methods_table({**results, "methods": side_by_side(rows, (), 0.01)}) is None


def test_routers_are_candidates_by_their_digest(router, folder, tmp_path):
    sha = load_model(folder).fingerprint
    made = flux_candidate(str(router), sha, 3)
    flux = made.policy.default.prefill
    assert made.name == f"flux {flux.router_sha256[:8]}" and made.kind == "routed"
    assert flux.sparse == SlidingWindow(64, 4), "what the routers were trained with"
    with pytest.raises(ConfigError, match="trained for weights"):
        flux_candidate(str(router), "0" * 64, 3)
    with pytest.raises(ConfigError, match="is no file"):
        flux_candidate(str(tmp_path / "none"), sha, 3)


def test_options_of_methods():
    assert TuneOptions("m").methods == ("greedy",) and TuneOptions("m", search=False).methods == ()
    assert TuneOptions("m", method="all").methods == ("greedy", "hylra")
    assert TuneOptions("m", method="all", router="r").methods == ("greedy", "hylra", "flux")
    assert TuneOptions("m", method="flux", router="r").digest() == TuneOptions("m").digest()
    with pytest.raises(ConfigError, match="foveal train flux"):
        TuneOptions("m", method="flux")
    for wrong in ({"method": "greedy"}, {"method": "all", "search": False}):
        with pytest.raises(ConfigError, match="expected method 'flux' or 'all'"):
            TuneOptions("m", router="r", **wrong)
