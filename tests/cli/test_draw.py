"""``foveal patterns show NAME`` with a picture, as typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foveal.cli import app

runner = CliRunner()


def show(*words: str) -> str:
    result = runner.invoke(app, ["patterns", "show", *words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def rows(shown: str) -> list[str]:
    return re.findall(r"│(.*)│", shown)


def test_few_tokens_are_shown_one_by_one() -> None:
    lines = rows(show("sliding_window", "--set", "window=2", "--tokens", "5"))
    assert lines == ["█▄   ", " ▀█▄ ", "   ▀▀"]


def test_many_tokens_are_shown_as_shaded_blocks() -> None:
    lines = rows(show("sliding_window", "--set", "window=64", "--tokens", "2048"))
    assert len(lines) == 32 and {len(line) for line in lines} == {64}
    assert set("".join(lines)) <= set(" ░▒▓█") and lines[0].strip() and not lines[-1][0].strip()


def test_every_head_has_its_own_picture() -> None:
    shown = show("block_topk", "--set", "budget.density=0.2", "--tokens", "1024", "--heads", "2")
    assert "head 0" in shown and "head 1" in shown and len(rows(shown)) == 64
    assert rows(shown)[:32] != rows(shown)[32:]


def test_the_chosen_querys_keys_are_drawn_on_the_grid() -> None:
    shown = show("sliding_window", "--set", "window=3", "--grid", "3x4", "--query", "1,1")
    assert shown.rstrip().splitlines()[-3:] == ["···█", "██··", "····"], "tokens 3, 4 and 5"
    whole = show("dense", "--grid", "2x2x3", "--bidirectional")
    assert whole.count("slice") == 2 and whole.count("███") >= 4


def test_a_pattern_on_a_grid_is_drawn_on_the_grid_that_was_given() -> None:
    shown = show("neighborhood", "--set", "window=3", "--grid", "4x5", "--query", "1,1", "--bidirectional")
    assert "grid=(4, 5)" in shown
    assert shown.rstrip().splitlines()[-4:] == ["███··", "███··", "███··", "·····"]
    cube = show("neighborhood", "--set", "window=[3,2,2]", "--grid", "4x3x2", "--bidirectional")
    assert "grid=(4, 3, 2)" in cube and cube.count("slice") == 3, "one slice has none"
    assert "grid=(6, 8)" in show("neighborhood", "--tokens", "48", "--bidirectional"), "the squarest one"


def test_what_is_not_given_leaves_something_out() -> None:
    for name in ("sliding_window", "neighborhood"):
        shown = show(name, "--tokens", "64", "--bidirectional")
        assert 0 < float(re.findall(r"density (\d\.\d+)", shown)[0]) < 1, name
    assert "tokens, density 1.000" not in show("disc", "--grid", "8x8", "--bidirectional")


@pytest.mark.parametrize("ending", ["png", "html"])
def test_files(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "new" / f"mask.{ending}"
    show("triangle", "--set", "window=100", "--tokens", "700", "--out", str(path))
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG") if ending == "png" else b"data:image/png;base64" in content
    if ending == "html":
        assert b'="http' not in content, "self-contained"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sliding_window", "--set", "window"], "expected FIELD=VALUE"),
        (["sliding_window", "--set", "windw=3"], "Did you mean 'window'"),
        (["sliding_window", "--set", "window=0", "--tokens", "9"], "window"),
        (["dense", "--grid", "6,6"], "such as 16x16"),
        (["dense", "--grid", "6x6", "--query", "6,0"], "2 numbers inside 6×6"),
        (["dense", "--grid", "6x6", "--tokens", "7"], "at least as many tokens"),
        (["dense", "--tokens", "7", "--query", "3"], "needs a --grid"),
        (["dense", "--tokens", "7", "--out", "mask.bmp"], ".png or .html"),
        (["neighborhood", "--set", "window=9", "--grid", "8x8"], "window"),
        (["rettention"], "is an operator"),
    ],
)
def test_bad_input_is_one_clear_error(words: list[str], message: str) -> None:
    result = runner.invoke(app, ["patterns", "show", *words], env={"COLUMNS": "300"})
    assert result.exit_code == 2 and message in result.output and "Traceback" not in result.output
