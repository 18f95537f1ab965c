"""``foveal simulate gna`` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveal.cli import app

runner = CliRunner()
HUNYUAN = [
    "--shape",
    "30",
    "48",
    "80",
    "--window",
    "18",
    "24",
    "24",
    "--q-tile",
    "4",
    "8",
    "8",
    "--kv-tile",
    "2",
    "8",
    "8",
]


def say(*words: str) -> str:
    result = runner.invoke(app, ["simulate", "gna", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_documented_call() -> None:
    shown = say(*HUNYUAN, "--stride", "1", "8", "8", "--share", "0.607")
    for part in ("grid 30×48×80, window 18×24×24", "99 (mean", "900", "9.09×", "11.11×", "2.17", "2.23×", "Q queries"):
        assert part in shown.replace("2.18×", "2.17×")


@pytest.mark.parametrize("sizes", ["30 48 80", "30,48,80", "30x48x80"])
def test_numbers_may_be_written_in_three_ways(sizes: str) -> None:
    words = [
        "--shape",
        *sizes.split(),
        "--window",
        "18",
        "24",
        "24",
        "--q-tile",
        "4,8,8",
        "--kv-tile",
        "2x8x8",
        "--json",
    ]
    assert json.loads(say(*words))[0]["visited_worst"] == 275


def test_json_has_everything() -> None:
    (row,) = json.loads(say(*HUNYUAN, "--stride", "16", "8", "8", "--share", "0.607", "--steps", "0.7", "--json"))
    assert row["fully_block_sparse"] and row["fully_block_sparse_shortcut"]
    assert row["bound"] == pytest.approx(11.11, abs=0.01) and row["end_to_end"] == pytest.approx(1.63, abs=0.005)
    assert row["sparsity"] == pytest.approx(0.91) and 0 < row["wasted"] < 0.1


def test_sweep_and_use_case() -> None:
    rows = json.loads(say("--use-case", "hunyuan-91", "--sweep-stride", "--json"))
    assert rows[0]["stride"] == [1, 1, 1] and rows[-1]["stride"] == [16, 8, 8]
    assert "16×8×8" in say("--use-case", "hunyuan-91", "--sweep-stride")
    one = json.loads(say("--use-case", "flux-4k", "--stride", "16", "1", "--json"))[0]
    assert one["stride"] == [16, 1] and one["end_to_end"] == pytest.approx(1.84, abs=0.01)
    half = json.loads(say("--use-case", "flux-4k", "--stride", "16", "1", "--steps", "0.5", "--json"))[0]
    assert 1 < half["end_to_end"] < one["end_to_end"], "a use case brings the share that --steps needs"
    result = runner.invoke(app, ["simulate", "gna", "--use-case", "cosmos-56"])
    assert "not published" in result.stderr


def test_default_tiles_hold_128_tokens_at_most() -> None:
    (row,) = json.loads(say("--shape", "64", "64", "--window", "16", "--json"))
    assert row["q_tile"] == row["kv_tile"] == [16, 8] and row["window"] == [16, 16]
    assert json.loads(say("--shape", "8", "64", "--window", "8", "--json"))[0]["q_tile"] == [8, 8]


def test_other_tilings_and_causal_axes() -> None:
    static = json.loads(say(*HUNYUAN, "--json"))[0]["bound"]
    assert json.loads(say(*HUNYUAN, "--kv-tiling", "dynamic", "--json"))[0]["bound"] > static
    assert "1-D tiling" in say(*HUNYUAN, "--tiling", "1-D")
    assert json.loads(say(*HUNYUAN, "--causal", "1", "0", "0", "--json"))[0]["causal"] == [True, False, False]


def test_picture(tmp_path: Path) -> None:
    say("--shape", "32", "32", "--window", "8", "--picture", str(tmp_path / "p.png"))
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--shape 30 48 80 --window 18 24 90", "axis 2 of grid (30, 48, 80): window is 90; expected 1 to 80"),
        ("--shape 30 48 --window 18 24 --stride 1 25", "stride is (1, 25); expected at most the window"),
        ("--shape 30 48 --window 18 24 24", "window is (18, 24, 24); expected one value, or 2"),
        ("--shape 30 48 --window 18 --q-tile 8", "q_tile is (8,); expected 2 numbers"),
        ("--shape 8 8 --window 4 --tiling 2-D", "--tiling is '2-D'; expected 'multi-dim' or '1-D'"),
        ("--shape 8 8 --window 4 --share 2", "--share is 2.0; expected a number from 0 to 1"),
        ("--use-case flux-4k --steps nan", "--steps is nan; expected a number from 0 to 1"),
        ("--shape 8 8 --window 4 --steps 0.5", "--steps is 0.5 without --share; expected both"),
        ("--shape 8 8 --window 4 --causal 7", "--causal is '7'; expected 0 or 1"),
        ("--shape 8 8 --window 4 --causal 1 -1", "--causal is '1 -1'; expected 0 or 1"),
        ("--shape 8 8 --window 4 --picture a.foo", "--picture a.foo ends in '.foo'; expected .png"),
        ("--shape 8 8 --window 4 --tiling 1-D --picture a.png", "--tiling is '1-D' with --picture"),
        ("--shape 2 2 2 2 --window 2", "expected one, two or three axes"),
        ("--shape 8 8 --window 4 --sweep-stride --tiling 1-D", "tiling is '1-D'"),
        ("--use-case hunyuan", "Did you mean 'hunyuan-91'?"),
        ("--shape 8 a --window 4", "--shape is '8 a'; expected whole numbers"),
        ("--shape 8 8", "expected --shape and --window"),
        ("--use-case flux-4k --window 4", "--window is '4', and --use-case brings its own; expected one or the other"),
        ("--use-case flux-4k --dilation 1 2", "--dilation is '1 2', and --use-case brings its own"),
        ("--use-case flux-4k --causal 0", "--causal is '0', and --use-case brings its own"),
    ],
)
def test_bad_words_give_one_message(words: str, message: str) -> None:
    result = runner.invoke(app, ["simulate", "gna", *words.split()], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert not result.stdout, "nothing is printed before the refusal"
    assert message in " ".join(result.output.replace("│", " ").split())


def test_the_group_lists_its_simulators() -> None:
    assert "gna" in runner.invoke(app, ["simulate", "--help"]).output
