"""``foveal eval`` end to end on a tiny model: files, resume, side by side, and every kind of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the package transformers")
pytest.importorskip("jinja2", reason="needs the package jinja2")
pytest.importorskip("matplotlib", reason="needs the package matplotlib")

from foveal.cli import app
from foveal.core.errors import ConfigError, DataError
from foveal.data.text import load_text
from foveal.evals import EvalOptions, run_eval
from foveal.evals.reader import Reader
from foveal.evals.report import heats, level, render, shown
from foveal.patterns import Dense, SlidingWindow
from foveal.policies import ModelStamp, Policy
from tests.tune.tiny import save_tiny_model

CONTEXT = 560


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    Policy.uniform(SlidingWindow(32, 2), name="window 32").save(path)
    return path


def options(model: Path, out: Path, **changes: Any) -> EvalOptions:
    text = model / "text.txt"  # tokenizing the whole default text takes longer than the rest
    text.write_text(load_text()[:30_000])
    return EvalOptions(
        **{"model": str(model), "context": CONTEXT, "text": str(text), "out": str(out), "trials": 1, **changes}
    )


@pytest.fixture(scope="module")
def results(model: Path, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out")
    seen: list[tuple[int, int]] = []
    got = run_eval(options(model, out, policies=(str(policy),)), lambda _, done, total: seen.append((done, total)))
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(got))
    assert (out / "report.html").read_text() == render(got)
    assert [done for done, _ in seen] == list(range(seen[-1][1] + 1)), "kl costs no unit of its own"
    return got


def test_results_hold_every_task_side_by_side(results: dict[str, Any]) -> None:
    assert list(results["tasks"]) == ["perplexity", "kl", "needle", "multikey", "tracking", "copy"]
    assert [arm["name"] for arm in results["arms"]] == ["dense", "window 32"]
    assert results["provenance"]["torch"] and results["model_info"]["layers"] == 2 and results["text"]["tokens"] > 1000
    for name, task in results["tasks"].items():
        assert list(task["arms"]) == (["window 32"] if name == "kl" else ["dense", "window 32"])
        assert list(task.get("change", {"window 32": 0})) == ["window 32"]
    assert results["tasks"]["kl"]["arms"]["window 32"]["mean"] > 0
    assert results["tasks"]["perplexity"]["arms"]["window 32"]["density"] < 0.5
    cells = results["tasks"]["needle"]["arms"]["dense"]["cells"]
    assert {cell["depth"] for cell in cells} == {0.0, 0.2, 0.4, 0.6, 0.8, 1.0} and max(
        c["length"] for c in cells
    ) == CONTEXT


def test_dense_as_a_policy_changes_nothing(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "dense.json"
    Policy.uniform(Dense()).save(file)
    got = run_eval(
        options(model, tmp_path / "out", policies=(str(file),), tasks=("perplexity", "kl", "copy"), context=150)
    )
    name = got["arms"][1]["name"]
    assert name != "dense" and got["tasks"]["kl"]["arms"][name]["mean"] < 1e-6
    assert abs(got["tasks"]["perplexity"]["change"][name]["increase"]) < 1e-5
    assert abs(got["tasks"]["copy"]["change"][name]["margin"]["mean"]) < 1e-4


def test_an_interrupted_run_goes_on_and_may_grow(
    model: Path, policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"tasks": ("perplexity", "copy"), "context": 150, "seed": 3}
    expected = run_eval(options(model, tmp_path / "whole", policies=(str(policy),), **wanted))
    read: list[str] = []
    quiz, passage = Reader.quiz, Reader.passage

    def failing(self: Reader, item: Any, arm: Any, what: str) -> Any:
        read.append(f"{item.key} {what}")
        if what == "window 32":
            raise KeyboardInterrupt
        return quiz(self, item, arm, what)

    monkeypatch.setattr(Reader, "quiz", failing)
    with pytest.raises(KeyboardInterrupt):
        run_eval(options(model, tmp_path / "out", policies=(str(policy),), **wanted))
    assert not (tmp_path / "out" / "results.json").exists() and read == ["copy.150.0 dense", "copy.150.0 window 32"]
    read.clear()

    def counted(self: Reader, item: Any, arm: Any, what: str) -> Any:
        read.append(f"{item.key} {what}")
        return (quiz if item.key.startswith("copy") else passage)(self, item, arm, what)

    monkeypatch.setattr(Reader, "quiz", counted)
    monkeypatch.setattr(Reader, "passage", counted)
    got = run_eval(options(model, tmp_path / "out", policies=(str(policy),), **wanted))
    assert read == ["copy.150.0 window 32"] and got["tasks"] == expected["tasks"]
    read.clear()
    more = run_eval(options(model, tmp_path / "out", policies=(str(policy),), **{**wanted, "trials": 2}))
    assert read == ["text.1 dense", "text.1 window 32", "copy.150.1 dense", "copy.150.1 window 32"]
    assert more["tasks"]["copy"]["arms"]["dense"]["asked"] == 8
    run_eval(options(model, tmp_path / "out", **{**wanted, "seed": 4}))
    assert (tmp_path / "out" / "journal.jsonl.old").exists(), "another seed does not mix"


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context": 2000}, "context is 2000, but .* was made for at most 1024 tokens; pass --context 1024 or less"),
        ({"tasks": ("nedle",)}, "unknown task 'nedle'. Did you mean 'needle'"),
        ({"tasks": ("kl",)}, "task 'kl' compares a policy with dense, and there is none; pass --policy"),
        ({"chat": True}, "has no chat template; use --no-chat"),
        ({"policies": ("nowhere.json",)}, "policy file nowhere.json does not exist"),
        ({"trials": 0}, "trials is 0; expected a value at least 1"),
        ({"context": 100}, "a context of 100 tokens has no room for needle"),
    ],
)
def test_bad_input_is_refused(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_eval(options(model, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_policy_for_another_model_or_given_twice_is_refused(model: Path, policy: Path, tmp_path: Path) -> None:
    for stamp, message in (
        (ModelStamp("LlamaForCausalLM", 5), "made for 5 layers and this model has 2"),
        (ModelStamp("LlamaForCausalLM", 2, "0" * 64), "made for weights 000000000000"),
    ):
        other = tmp_path / "other.json"
        Policy(model=stamp).save(other)
        with pytest.raises(ConfigError, match=message):
            run_eval(options(model, tmp_path / "out", policies=(str(other),)))
    with pytest.raises(ConfigError, match="give each --policy once"):
        run_eval(options(model, tmp_path / "out", policies=(str(policy), str(policy))))


def test_a_short_text_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Too short.")
    with pytest.raises(DataError, match="pass a longer --text or a smaller --context"):
        run_eval(options(model, tmp_path / "out", text=str(text)))


# --- the command and the report ---------------------------------------------------------------------------------------


def test_the_command(model: Path, policy: Path, tmp_path: Path) -> None:
    options(model, tmp_path)  # writes the text
    words = [
        "eval",
        model,
        "--policy",
        policy,
        "--context",
        150,
        "--tasks",
        "perplexity, copy",
        "--trials",
        1,
        "--text",
        model / "text.txt",
        "--out",
        tmp_path / "out",
    ]
    result = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    for word in ("perplexity", "copy", "dense", "window 32", "report.html", "results.json"):
        assert word in result.stdout
    bad = CliRunner().invoke(app, ["eval", str(model), "--tasks", "copi"], env={"COLUMNS": "300"})
    assert bad.exit_code == 2 and "Did you mean 'copy'?" in bad.stderr and "Traceback" not in bad.output


def test_the_report_needs_nothing_else_and_shows_every_arm(results: dict[str, Any]) -> None:
    page = render(results)
    assert (
        not re.search(r'(src|href)="(?!data:,|#)', page)
        and not re.search(r"url\((?!#)", page)
        and "@import" not in page
    )
    for task in results["tasks"].values():
        assert task["title"] in page
    assert page.count('class="curve"') == 2 and page.count("<figure") == 3 * 3 * 2 + 2 * 2
    assert page.count("window 32") > 10 and "<script>alert" not in page


def test_the_report_escapes_names(results: dict[str, Any]) -> None:
    evil = json.loads(json.dumps(results).replace("window 32", "<script>alert(1)</script>"))
    assert "<script>alert" not in render(evil)


def test_heat_maps_share_their_scale(results: dict[str, Any]) -> None:
    task = results["tasks"]["needle"]
    maps = [h for h in heats(task) if h.note.startswith("Margin")]
    assert [h.title for h in maps] == ["dense", "window 32"] and len({(h.low, h.high) for h in maps}) == 1
    assert [label for label, _ in maps[0].rows] == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
    assert level(0.0, 0.0, 1.0) == 0 and level(1.0, 0.0, 1.0) == 23 and level(5.0, 5.0, 5.0) == 0


def test_figures_are_written_with_their_intervals() -> None:
    assert shown({"mean": 0.5, "interval": [0.25, 0.75]}, "exact") == "50 [25, 75]"
    assert shown({"mean": -0.5, "interval": None}, "margin") == "−0.50"
    assert (
        shown({"mean": 0.1, "interval": [0.0, 0.2]}, "exact", change=True) == "+10 [0, +20]"
        and shown(None, "exact") == "–"
    )


def test_results_of_another_schema_are_refused(results: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="foveal_eval is 7"):
        render({**results, "foveal_eval": 7})
    with pytest.raises(DataError, match="lacks the field 'arms'"):
        render({k: v for k, v in results.items() if k != "arms"})
