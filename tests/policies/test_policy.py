"""A policy says which pattern each layer and head uses; its file is validated field by field."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from foveal import Policy
from foveal.core.errors import ConfigError
from foveal.patterns import Dense, SlidingWindow, Triangle
from foveal.policies import ModelStamp, Rule

WINDOW, TRIANGLE = SlidingWindow(256, sinks=4), Triangle(128)
FULL = Policy(
    default=Rule(WINDOW),
    layers=(
        (0, Rule()),
        (1, Rule()),
        (3, Rule(TRIANGLE, WINDOW)),
        (7, Rule(WINDOW, None, ((0, 1, Rule()), (4, 4, Rule(TRIANGLE))))),
    ),
    name="mixed",
    model=ModelStamp("LlamaForCausalLM", 8, "ab" * 32),
    dtype="bfloat16",
    context=(1024, 4096),
)


@pytest.mark.parametrize(
    "policy",
    [FULL, Policy(), Policy.uniform(WINDOW), Policy.uniform(TRIANGLE, WINDOW)],
    ids=lambda p: p.name or "empty",
)
def test_round_trip_through_a_file(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    policy.save(path)
    assert Policy.load(path) == policy
    assert [p.name for p in tmp_path.iterdir()] == ["policy.json"]
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy
    assert hash(policy) == hash(Policy.load(path))


def test_layers_and_heads_find_their_rule() -> None:
    assert FULL.rule(0).pattern(decoding=False) == Dense()
    assert FULL.rule(2).pattern(decoding=True) == WINDOW, "the default, in decoding too"
    assert FULL.rule(3).pattern(decoding=False) == TRIANGLE
    assert FULL.rule(3).pattern(decoding=True) == WINDOW
    assert [(a, b) for a, b, _ in FULL.rule(7).heads] == [(0, 1), (4, 4)]


def test_neighbouring_layers_share_an_entry() -> None:
    data = FULL.to_json()
    assert list(data["layers"]) == ["0-1", "3", "7"]
    assert data["foveal_policy"] == 1
    assert list(data["layers"]["7"]["heads"]) == ["0-1", "4"]


def test_short_forms_are_read() -> None:
    data = {"foveal_policy": 1, "layers": {"2-3": {"pattern": "dense"}}}
    assert Policy.from_json(data).layers == ((2, Rule()), (3, Rule()))
    assert Policy.from_json({"foveal_policy": 1}) == Policy()


def test_of_takes_policies_and_patterns_only() -> None:
    assert Policy.of(FULL) is FULL
    assert Policy.of(WINDOW) == Policy.uniform(WINDOW)
    assert Policy.of(WINDOW).name == str(WINDOW)
    with pytest.raises(ConfigError, match=r"policy is a str; expected a foveal.Policy or a Pattern"):
        Policy.of("dense")  # type: ignore[arg-type]


WRONG: dict[str, tuple[Any, str]] = {
    "list": ([], r"p.json is \[\]; expected an object with the fields foveal_policy, name"),
    "version": ({"foveal_policy": 2}, "foveal_policy is 2; this foveal reads version 1. Make the policy again"),
    "no version": ({}, "foveal_policy is None"),
    "unknown": ({"foveal_policy": 1, "layer": {}}, "unknown field 'layer'. Did you mean 'layers'?"),
    "layers": ({"foveal_policy": 1, "layers": [1]}, r"layers is \[1\]; expected an object such as"),
    "span": ({"foveal_policy": 1, "layers": {"a": {}}}, "layers has the entry 'a'; expected a number such as"),
    "span backwards": ({"foveal_policy": 1, "layers": {"3-1": {}}}, "entry '3-1'; expected a number such as"),
    "overlap": ({"foveal_policy": 1, "layers": {"0-3": {}, "3": {}}}, "lists '0-3' and '3', which overlap"),
    "rule": ({"foveal_policy": 1, "layers": {"0": 3}}, r"layers\[0\] is 3; expected an object with the fields prefill"),
    "rule field": (
        {"foveal_policy": 1, "layers": {"0": {"decod": {}}}},
        r"layers\[0\] has an unknown field 'decod'. Did you mean 'decode'?",
    ),
    "pattern": (
        {"foveal_policy": 1, "default": {"prefill": {"pattern": "dens"}}},
        r"default.prefill: unknown pattern 'dens'. Did you mean 'dense'",
    ),
    "pattern field": (
        {"foveal_policy": 1, "layers": {"2": {"decode": {"pattern": "sliding_window", "window": -1}}}},
        "SlidingWindow.window is -1; expected a value at least 1",
    ),
    "field type": (
        {"foveal_policy": 1, "layers": {"2": {"decode": {"pattern": "sliding_window", "window": "x"}}}},
        r"layers\[2\].decode \(sliding_window\).window is 'x'.*expected a whole number",
    ),
    "heads": ({"foveal_policy": 1, "default": {"heads": [0]}}, r"default.heads is \[0\]; expected an object"),
    "heads overlap": (
        {"foveal_policy": 1, "default": {"heads": {"0-2": {}, "1": {}}}},
        "default.heads lists '0-2' and '1', which overlap",
    ),
    "name": ({"foveal_policy": 1, "name": 3}, "name is 3; expected a string"),
    "dtype": ({"foveal_policy": 1, "dtype": 16}, "dtype is 16; expected a string"),
    "model": (
        {"foveal_policy": 1, "model": {"layrs": 3}},
        "model has an unknown field 'layrs'. Did you mean 'layers'?",
    ),
    "model type": ({"foveal_policy": 1, "model": {"layers": "8"}}, "model.layers is '8'; expected"),
    "context": ({"foveal_policy": 1, "context": [4096]}, r"context is \[4096\]; expected two lengths such as"),
    "context order": ({"foveal_policy": 1, "context": [8, 4]}, r"context is \[8, 4\]; expected two lengths"),
}


@pytest.mark.parametrize("case", WRONG)
def test_messages_name_field_value_and_expectation(case: str) -> None:
    data, message = WRONG[case]
    before = copy.deepcopy(data)
    with pytest.raises(ConfigError, match=message) as error:
        Policy.from_json(data, "p.json")
    assert "p.json" in str(error.value) or case == "pattern field"
    assert data == before


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing, broken, binary = tmp_path / "no.json", tmp_path / "broken.json", tmp_path / "binary.json"
    broken.write_text("{", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, message in (
        (missing, "does not exist; make one with"),
        (broken, "is not JSON"),
        (binary, "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            Policy.load(path)
        assert str(path) in str(error.value)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    Policy.uniform(WINDOW).save(path)
    with pytest.raises(OSError):
        FULL.save(tmp_path / "no such folder" / "policy.json")
    assert Policy.load(path) == Policy.uniform(WINDOW)


def test_a_policy_for_another_model_is_refused() -> None:
    FULL.check_fits(8, "LlamaForCausalLM", "ab" * 32)
    FULL.check_fits(8, "LlamaForCausalLM")
    for arguments, message in (
        ((6, "LlamaForCausalLM"), r"names layer 7, but the model has 6 self-attention layers \(0 to 5\)"),
        ((9, "LlamaForCausalLM"), "was made for 8 layers and this model has 9; run `foveal tune`"),
        ((8, "Qwen2ForCausalLM"), "was made for LlamaForCausalLM and this model is Qwen2ForCausalLM"),
        ((8, "LlamaForCausalLM", "cd" * 32), "was made for weights abababababab and this model's are cdcdcdcdcdcd"),
    ):
        with pytest.raises(ConfigError, match=message):
            FULL.check_fits(*arguments)
    Policy.uniform(WINDOW).check_fits(1, "Anything")
