"""``foveal papers``, ``foveal patterns`` and ``foveal info`` as typed."""

from __future__ import annotations

import dataclasses
import json

import pytest
from typer.testing import CliRunner

import foveal
import foveal.core.budget
from foveal.cli import app
from foveal.cli.patterns import example, read_docstring
from foveal.papers import cards, load_card
from foveal.patterns import Pattern, names, operators
from foveal.policies import Policy

runner = CliRunner()


def say(*words: str) -> str:
    result = runner.invoke(app, list(words), env={"COLUMNS": "2000"})
    assert result.exit_code == 0, result.output
    return result.output


def test_papers_lists_all_cards() -> None:
    shown = say("papers")
    assert all(slug in shown for slug in cards())


def test_papers_searches() -> None:
    shown = say("papers", "eeg", "channel")
    assert "eeg_channel_attention" in shown and "dhsa" not in shown


def test_papers_without_a_match() -> None:
    result = runner.invoke(app, ["papers", "zzzz"])
    assert result.exit_code == 1 and "no paper matches 'zzzz'" in result.stderr


def test_papers_show() -> None:
    shown, card = say("papers", "show", "dhsa"), load_card("dhsa")
    for part in (card.title, card.rooms[0], card.claims[0].id, str(card.claims[0].state), card.errata[0].what):
        assert part in shown


@pytest.mark.parametrize(
    "words", [["papers", "show"], ["papers", "show", "a", "b"], ["patterns", "dense"], ["patterns", "show"]]
)
def test_wrong_words(words: list[str]) -> None:
    result = runner.invoke(app, words)
    assert result.exit_code == 2 and "for example: foveal" in " ".join(result.output.replace("│", " ").split())


def test_misspelt_names() -> None:
    assert "Did you mean 'dhsa'" in runner.invoke(app, ["papers", "show", "dhs"]).stderr
    result = runner.invoke(app, ["patterns", "show", "sliding_windw"])
    assert result.exit_code == 2 and "Did you mean 'sliding_window'" in result.stderr


def test_patterns_lists_all() -> None:
    shown = say("patterns")
    for name, cls in {**names(), **operators()}.items():
        assert name in shown and cls.__name__ in shown


@pytest.mark.parametrize("name", sorted(names()))
def test_pattern_show_is_complete_and_its_examples_work(name: str) -> None:
    cls = names()[name]
    shown = say("patterns", "show", name)
    for field in dataclasses.fields(cls):
        assert f" {field.name} " in shown
    line = next(x for x in shown.splitlines() if '"foveal_policy"' in x)
    pattern = Policy.from_json(json.loads(line)).default.prefill
    assert isinstance(pattern, cls)
    python = shown.strip().splitlines()[-1].strip()
    assert eval(python, {"foveal": foveal}) == pattern
    assert Pattern.from_json(example(cls)) == pattern


@pytest.mark.parametrize("name", sorted(names()))
def test_every_field_of_a_pattern_is_described(name: str) -> None:
    cls = names()[name]
    described = read_docstring(foveal.cli.patterns.inspect.getdoc(cls) or "")[1]
    assert {f.name for f in dataclasses.fields(cls)} == set(described)


def test_read_docstring() -> None:
    text = "First ``line``\ngoes on.\n\nAttributes:\n    a: one\n        more.\n    b, c: two.\n\nThe :class:`~x.Y` rest\nends."
    assert read_docstring(text) == (
        "First line goes on.",
        {"a": "one more.", "b": "two.", "c": "two."},
        "The x.Y rest ends.",
    )
    assert read_docstring("Only this.") == ("Only this.", {}, "")


def test_info() -> None:
    assert "Attention implementations" in say("info")
    assert json.loads(say("info", "--json"))["foveal"] == foveal.__version__
