"""``foveal simulate kinetics`` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveal.cli import app

runner = CliRunner()


def say(*words: str) -> str:
    result = runner.invoke(app, ["simulate", "kinetics", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_documented_call() -> None:
    shown = say("--model", "qwen3-8b", "--hardware", "b200", "--in", "256", "--out", "16384")
    for part in ("8.19B active", "562.5 FLOP/byte", "after 395 tokens", "11830.46", "1645.20", "2006.51", "5.90×"):
        assert part in shown


def test_json_limit_and_laws() -> None:
    found = json.loads(say("--method", "block-topk", "--limit", "2000", "--json"))
    dense, block = found["methods"][0], found["methods"][4]
    assert (dense["method"], block["method"]) == ("dense", "block top-k 16×64")
    assert block["tokens_within_limit"]["1"] > dense["tokens_within_limit"]["1"] > dense["tokens_within_limit"]["8"]
    old = json.loads(say("--method", "dense", "--compute-only", "--json"))
    assert old["crossover_tokens"] is None and old["methods"][0]["kv_teflops"] == 0
    half = json.loads(say("--method", "dense", "--hardware", "b200-bf16", "--json"))["methods"][0]
    assert half["kv_teflops"] == pytest.approx(dense["kv_teflops"] / 2)
    assert "tokens per trial for 2000 TeFLOPs" in say("--limit", "2000")


def test_traces_and_pictures(tmp_path: Path) -> None:
    rows = [
        {"question": q, "model": m, "prompt": 100, "lengths": [900, 5000], "correct": right, **more}
        for q, m, right, more in (
            ("a", "qwen3-0.6b", [True, False], {}), ("b", "qwen3-0.6b", [False, False], {}),
            ("a", "qwen3-8b", [True, True], {"budget": 512}), ("b", "qwen3-8b", [True, True], {"budget": 512}),
        )
    ]  # fmt: skip
    file, image = tmp_path / "t.json", tmp_path / "p.png"
    file.write_text(json.dumps(rows))
    found = json.loads(say("--traces", str(file), "--picture", str(image), "--json"))
    assert image.stat().st_size > 1000 and len(found["limits"]) == 100
    assert found["accuracy"]["all"][-1] == 1 and found["accuracy"]["dense"][-1] == 0.5
    assert found["frontier"][-1]["accuracy"] == 1 and found["frontier"][-1]["model"] == "qwen3-8b"
    assert "needs the answers" in say("--traces", str(file))
    best = json.loads(say("--traces", str(file), "--limit", "100000", "--json"))["frontier"]
    assert len(best) == 1 and best[0]["accuracy"] == 1
    assert json.loads(say("--traces", str(file), "--limit", "0.001", "--json"))["frontier"] == []
    say("--picture", str(tmp_path / "c.png"))
    assert (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--model qwen3-9b", "Did you mean 'qwen3-"),
        ("--hardware b300", "Did you mean 'b200'?"),
        ("--hardware 0:5", "flops of hardware '0:5' is 0.0"),
        ("--method topp", "Did you mean 'topk'?"),
        ("--in -1", "prompt is -1"),
        ("--out 0", "--out is 0; expected at least 1 token"),
        ("-n 0", "trials is 0"),
        ("--kv-bytes 0", "kv_bytes is 0.0"),
        ("--combine add", "combine is 'add'"),
        ("--limit -1", "--limit is -1.0; expected a positive number"),
        ("--traces none.json", "cannot be read"),
        ("--picture a.foo", "--picture a.foo ends in '.foo'; expected .png"),
    ],
)
def test_bad_words_give_one_message(words: str, message: str) -> None:
    result = runner.invoke(app, ["simulate", "kinetics", *words.split()], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert message in " ".join(result.output.replace("│", " ").split())
