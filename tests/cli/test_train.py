"""``foveal train flux`` as typed: files, the policy in ``foveal run``, going on, refusals."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the package transformers")

from foveal.cli import app
from tests.tune.tiny import save_tiny_model

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def train(folder, out, *more):
    words = ["train", "flux", folder, "--out", out, "--tokens", 256, "--steps", 3, "--pool", 8, *more]
    return runner.invoke(app, [str(w) for w in words])


def test_train_then_run(folder, tmp_path):
    got = train(folder, tmp_path / "a", "--lr", 0.05)
    assert got.exit_code == 0, got.stderr
    assert "retrieval: " in got.stdout and "local: " in got.stdout
    said = json.loads((tmp_path / "a" / "training.json").read_text())
    assert said["steps"] == 3 and len(said["history"]) == 3 and said["provenance"]["torch"]
    sha = said["router_sha256"]
    first = (tmp_path / "a" / "router.safetensors").read_bytes()
    (tmp_path / "a" / "router.safetensors").unlink()
    again = train(folder, tmp_path / "a", "--lr", 0.05)
    assert again.exit_code == 0 and "[3/3]" not in again.stderr, "nothing was left to train"
    assert (tmp_path / "a" / "router.safetensors").read_bytes() == first
    assert json.loads((tmp_path / "a" / "training.json").read_text())["router_sha256"] == sha
    shown = runner.invoke(app, ["run", str(folder), "--policy", str(tmp_path / "a" / "policy.json"), "--prompt", "One two three", "--max-new-tokens", "3"])  # fmt: skip
    assert shown.exit_code == 0, shown.stderr
    assert "routed: " in shown.stderr and "of 2 layers sparse" in shown.stderr
    other = save_tiny_model(tmp_path / "other", seed=5)
    refused = runner.invoke(
        app, ["run", str(other), "--policy", str(tmp_path / "a" / "policy.json"), "--prompt", "One"]
    )
    assert refused.exit_code == 2 and "was trained for weights" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sparse", "streaming"), "keeps everything of 256 tokens"),
        (("--sparse", "streamin"), "expected one of streaming, triangle"),
        (("--sparse", '{"pattern": "sliding_windw"}'), "Did you mean 'sliding_window'"),
        (("--local", 1.5), "from 0 to 1"),
        (("--mode", "hard"), "'soft'"),
        (("--tokens", 2048), "made for at most 1024"),
        (("--tokens", 80), "leave no distance"),
    ],
)
def test_bad_input_is_one_clear_error(folder, tmp_path, words, message):
    got = train(folder, tmp_path / "b", *words)
    assert got.exit_code == 2 and message in got.stderr
    assert not (tmp_path / "b" / "policy.json").exists()


def test_the_switch_writes_the_changed_model(folder, tmp_path):
    got = train(folder, tmp_path / "c", "--backbone-lr", 0.01)
    assert got.exit_code == 0, got.stderr
    policy = str(tmp_path / "c" / "policy.json")
    words = ["--policy", policy, "--prompt", "One two", "--max-new-tokens", "2"]
    assert runner.invoke(app, ["run", str(tmp_path / "c" / "model"), *words]).exit_code == 0
    assert runner.invoke(app, ["run", str(folder), *words]).exit_code == 2
