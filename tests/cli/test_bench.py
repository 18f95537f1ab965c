"""``foveal bench`` as typed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foveal.bench import implementations
from foveal.bench.records import FILE, read
from foveal.cli import app

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

runner = CliRunner()
SMALL = [
    "--masks",
    "causal,csw:window=20",
    "--lengths",
    "96,160",
    "--heads",
    "4",
    "--kv-heads",
    "4,2",
    "--head-dim",
    "16",
    "--impl",
    "gather,sdpa",
    "--repeats",
    "1",
]


def run(*words: str, code: int = 0) -> str:
    result = runner.invoke(app, ["bench", *words], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_the_documented_call(tmp_path: Path) -> None:
    shown = run(*SMALL, "--backward", "--dtype", "float32,bfloat16", "--out", str(tmp_path))
    for part in (
        "4 heads of 16, float32, forward", "4 query and 2 key heads of 16, bfloat16, backward", "causal_sliding:window=20", "†",
        str(tmp_path / FILE), str(tmp_path / "report.html"), "[0/32] causal, 96 tokens, heads 4:4×16, float32, forward", "[32/32] done",
    ):  # fmt: skip
        assert part in shown
    _, rows = read(tmp_path)
    assert len(rows) == 2 * 2 * 2 * 2 * 2 * 2 and {row["status"] for row in rows} == {"ok"}
    assert {row["length"] for row in rows} == {96, 160} and {row["kv_heads"] for row in rows} == {4, 2}
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_same_command_again_measures_nothing(tmp_path: Path) -> None:
    run(*SMALL, "--out", str(tmp_path))
    before = (tmp_path / FILE).read_bytes()
    (tmp_path / "report.html").unlink()
    run(*SMALL, "--out", str(tmp_path))
    assert (tmp_path / FILE).read_bytes() == before and (tmp_path / "report.html").is_file()


def test_quick_means_all_masks_small_and_both_ways(tmp_path: Path) -> None:
    shown = run("--quick", "--lengths", "128", "--impl", "sdpa,natten", "--repeats", "1", "--out", str(tmp_path))
    _, rows = read(tmp_path)
    assert len(rows) == 14 * 2 and {row["status"] for row in rows} == {"ok"}
    assert {(row["heads"], row["kv_heads"]) for row in rows} == {(4, 2)}
    assert "global_sliding:window=64" in shown and "block_causal_document:block=128" in shown
    assert "natten: " in shown and "natten" not in {row["impl"] for row in rows}


def test_4k_means_4096_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.bench import sweep

    seen: list[Any] = []
    monkeypatch.setattr(sweep, "measure_case", lambda case, todo, own: [seen.append(case), {**case.row("sdpa"), "status": "oom", "why": "made up"}][1:])  # fmt: skip
    run("--masks", "cd", "--lengths", "4k,300", "--impl", "sdpa", "--draws", "2", "--out", str(tmp_path))
    assert [(case.length, case.draw) for case in seen] == [(4096, 0), (4096, 1), (300, 0), (300, 1)]
    assert str(seen[0].heads) == "8:8×64" and seen[0].dtype == "float32"


def test_a_wrong_result_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = implementations.Sdpa.prepare

    def off(self: implementations.Sdpa, work: Any) -> implementations.Prepared:
        right = usual(self, work)
        return implementations.Prepared(lambda q, k, v: 1.1 * right.run(q, k, v))

    monkeypatch.setattr(implementations.Sdpa, "prepare", off)
    shown = run(*SMALL, "--out", str(tmp_path), code=1)
    assert (
        "8 results are wrong: sdpa." in shown
        and "sdpa has no rate for causal, causal_sliding:window=20: wrong: differs" in " ".join(shown.split())
    )
    assert (tmp_path / "report.html").is_file()


def test_an_interruption_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.bench import sweep

    usual, calls = sweep.measure_case, []

    def once(*words: Any) -> Any:
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return usual(*words)

    monkeypatch.setattr(sweep, "measure_case", once)
    assert "interrupted; what was computed is kept." in run(*SMALL, "--out", str(tmp_path), code=130)
    assert len(read(tmp_path)[1]) == 2


def test_without_the_report_packages_the_figures_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    shown = run(*SMALL, "--out", str(tmp_path))
    assert "reports need jinja2: pip install 'foveal[report]'." in shown and "lead" in shown
    assert len(read(tmp_path)[1]) == 16 and not (tmp_path / "report.html").exists()


def test_comparing_two_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(*SMALL, "--out", str(tmp_path / name))
    head, *lines = (tmp_path / "b" / FILE).read_text().splitlines()
    rows = [json.loads(text) for text in lines]
    rows = [{**row, "tflops": 3 * row["tflops"]} for row in rows if row["impl"] != "gather" or row["length"] != 96]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([head, *map(json.dumps, rows)]) + "\n")
    again = run("--compare", str(tmp_path / "a"), str(tmp_path / "a" / FILE))
    assert "1.000" in again and "geometric mean" in again and "not in both" not in again
    shown = run("--compare", str(tmp_path / "b"), str(other))
    assert "geometric mean" in shown and "3.000" in shown
    assert (
        "4 cases are not in both:" in shown
        and "causal, 96 tokens, 4 heads of 16, float32, forward, gather (A: ok, B: absent)" in shown
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--masks causl", "mask 'causl' is unknown. Did you mean 'causal'?"),
        ("--impl sdap", "implementation 'sdap' is unknown. Did you mean 'sdpa'?"),
        ("--lengths 4q", "--lengths holds '4q'; expected tokens such as 4096 or 4k"),
        ("--kv-heads 3", "8 query heads, 3 key heads of 64; expected"),
        ("--kv-heads two", "--kv-heads is 'two'"),
        ("--dtype float8", "dtype is 'float8'; expected one of float32"),
        ("--device gpu", "device is 'gpu'"),
        ("--repeats -1", "repeats is -1"),
        ("--compare no.jsonl no.jsonl", "no.jsonl cannot be read: No such file"),
    ],
)
def test_bad_words_give_one_message_and_no_file(words: str, message: str, tmp_path: Path) -> None:
    shown = run(*words.split(), "--out", str(tmp_path / "new"), code=2)
    assert message in shown and "Traceback" not in shown and not (tmp_path / "new").exists()


def test_another_schema_is_one_error_and_the_file_stays(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"foveal_bench": 0}\n')
    for words in ([*SMALL, "--out", str(tmp_path)], ["--compare", str(tmp_path), str(tmp_path)]):
        shown = run(*words, code=2)
        assert "has schema 0; this foveal reads and writes schema 1" in shown and "Traceback" not in shown
    assert (tmp_path / FILE).read_text() == '{"foveal_bench": 0}\n' and not (tmp_path / "report.html").exists()
