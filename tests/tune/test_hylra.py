"""``foveal tune --method hylra``: two more candidates of one density, the plan in the results, nothing profiled twice."""

from __future__ import annotations

import json

import pytest

from foveal.core.budget import Budget
from foveal.core.errors import ConfigError
from foveal.patterns import BlockTopK
from foveal.policies import Policy
from foveal.policies.hylra import Plan
from foveal.tune import TuneOptions, run_tune
from tests.tune.tiny import save_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), layers=4)


def test_hylra_and_even_spacing_are_candidates(folder, tmp_path, monkeypatch):
    listed = [("block top-k", BlockTopK(budget=Budget(density=0.5)))]
    monkeypatch.setattr("foveal.tune.candidates.patterns", lambda context: listed)
    options = TuneOptions(
        model=str(folder), context=512, out=str(tmp_path / "out"), decode_tokens=8, method="hylra", impl="gather"
    )
    ticks: list[tuple[int, int]] = []
    results = run_tune(options, report=lambda what, done, total: ticks.append((done, total)))
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["search"] is None and stored["settings"]["method"] == "hylra"
    assert [d for d, _ in ticks] == sorted(d for d, _ in ticks)
    plan = Plan.from_json(stored["hylra"]["plans"]["hylra"])
    rows = {c["name"]: c for c in stored["candidates"]}
    assert list(rows)[-2:] == ["hylra", "even spacing"]
    density = [rows[name]["density"] for name in ("hylra", "even spacing")]
    assert density[0] == pytest.approx(density[1], abs=0.02) and density[0] < 0.9
    policy = Policy.from_json(rows["hylra"]["policy"])
    patterns = [type(policy.rule(j).prefill).__name__ for j in range(4)]
    named = {"full": "Dense", "compute": "BlockTopK", "reuse": "Reuse"}
    assert patterns == [named[plan.role(j)] for j in range(4)]
    html = (tmp_path / "out" / "report.html").read_text()
    assert "hylra" in html and "even spacing" in html
    assert Policy.load(tmp_path / "out" / "policy.json").name == results["chosen"]

    def again(*args, **kwargs):
        raise AssertionError("profiled twice")

    monkeypatch.setattr("foveal.tune.hylra.profile", again)
    assert run_tune(options)["hylra"] == stored["hylra"]


def test_an_unknown_method_is_refused(folder):
    with pytest.raises(ConfigError, match="Did you mean 'hylra'"):
        TuneOptions(model=str(folder), method="hylr")
