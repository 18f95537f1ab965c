"""``foveal steer`` as typed, on tiny models that were saved to disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("transformers", reason="needs the package transformers")
pytest.importorskip("gguf", reason="needs the package gguf")
pytest.importorskip("PIL", reason="needs the package pillow")

from foveal.cli import app
from foveal.hf.load import load_model
from foveal.steer import HeadScale, apply

from ..hf.tiny_gguf import LAYERS, write_tiny_folder
from .tiny_vlm import write_tiny_vlm

runner = CliRunner()
PROMPT = "the cat and the hat"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("steer"))


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("steer") / "tinyvlm")


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    path = tmp_path_factory.mktemp("picture") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(path)
    return path


def foveal(*words: object) -> Result:
    return runner.invoke(app, ["steer", *(str(w) for w in words)], env={"COLUMNS": "300"})


def test_both_answers_are_those_of_the_model_with_and_without(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "steer.json"
    result = foveal(
        model, "--prompt", PROMPT, "--scale", "0=3", "--max-new-tokens", 6, "--json", out, "--device", "cpu"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    loaded = load_model(model, device="cpu")
    ids = torch.tensor([loaded.tokenizer(PROMPT).input_ids])
    with torch.no_grad():
        plain = loaded.model(ids).logits[0, -1].softmax(-1)
        with apply(loaded.model, HeadScale({0: [0, 1, 2, 3]}, 3.0)):
            changed = loaded.model(ids).logits[0, -1].softmax(-1)
            text = loaded.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1)[0, ids.shape[1] :]
    assert found["after"]["text"] == loaded.tokenizer.decode(text, skip_special_tokens=True)
    assert found["before"]["probabilities"][0] == pytest.approx(float(plain.max()), abs=1e-5)
    assert found["after"]["probabilities"][0] == pytest.approx(float(changed.max()), abs=1e-5)
    assert found["logit_change"] > 0 and found["guards"][0]["fired"] and found["guards"][0]["calls"] == 6
    assert found["interventions"] == [{"scale": "0", "amount": 3.0}] and found["provenance"]["torch"]
    for said in ("before", "after", "scale 0: fired", "largest change of a logit", str(out)):
        assert said in result.stdout
    best = {repr(row["token"]): row for row in found["first"]}
    assert all(token in result.stdout for token in best) and len(best) >= 5


def test_nothing_changed_is_said(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "steer.json"
    result = foveal(
        model, "--prompt", PROMPT, "--scale", "0=1", "--context", "user=0.5", "--max-new-tokens", 4, "--json", out
    )
    assert result.exit_code == 0, result.output
    assert "ContextSteering changed nothing" in result.stderr and "did not fire" in result.stdout
    found = json.loads(out.read_text())
    assert found["logit_change"] == 0 and found["before"] == found["after"] and found["same_tokens"] == 4


def test_several_act_in_order_from_a_file_and_from_the_line(model: Path, tmp_path: Path) -> None:
    spec, out = tmp_path / "spec.json", tmp_path / "out.json"
    spec.write_text(json.dumps([{"knockout": "cat", "layers": "0"}, {"context": "hat=0.1"}]))
    result = foveal(model, "--prompt", PROMPT, "--spec", spec, "--scale", "1.0", "--knockout", "0-1=0.5", "--json", out, "--max-new-tokens", 3)  # fmt: skip
    assert result.exit_code == 0, result.output
    guards = json.loads(out.read_text())["guards"]
    assert [g["intervention"] for g in guards] == ["Knockout", "ContextSteering", "HeadScale", "Knockout"]
    assert all(g["fired"] for g in guards) and guards[1]["before"] < guards[1]["after"] and 0 < guards[0]["mass"] < 1
    assert guards[0]["calls"] == 3 and guards[3]["calls"] == 3 * LAYERS


def test_visual_interventions_on_a_picture(vlm: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps([{"var": "dims:5,11=0.9", "tau": 1.5, "min_mass": 0.0, "rho": 0.1}]))
    words = (vlm, "--prompt", "what colour is the cat ?", "--image", picture, "--max-new-tokens", 4, "--json", out)
    result = foveal(*words, "--spec", spec, "--vhr", 3)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [g["intervention"] for g in found["guards"]] == ["VAR", "VHR"] and all(g["fired"] for g in found["guards"])
    assert found["guards"][0]["changed"] > 0 and found["logit_change"] > 1e-3
    result = foveal(*words, "--knockout", "image", "--context", "cat=0.3")
    assert result.exit_code == 0, result.output
    assert json.loads(out.read_text())["guards"][0]["mass"] > 0.1
    assert foveal(*words[:3], "--knockout", "cat").exit_code == 0, "a vision-language model also answers text alone"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to change; give one of --scale, --knockout, --context, --var, --vhr"),
        (["--scale", "3.5=much"], "what follows = is 'much'; expected a number"),
        (["--scale", f"{LAYERS}.0=0"], f"heads names layer {LAYERS}; LlamaForCausalLM has layers 0 to {LAYERS - 1}"),
        (["--scale", "0.9=0"], "heads names head 9 of layer 0, which has heads 0 to 3"),
        (["--knockout", "dog"], "the prompt's tokens do not spell 'dog'"),
        (["--knockout", "90"], "names position 90"),
        (["--knockout", "image"], "this prompt has no picture"),
        (["--context", "2.0"], "alpha is 2.0; expected a number above 0 and at most 1"),
        (["--context", "cat=0.5", "--context", "hat=0.5"], "2 × ContextSteering"),
        (["--vhr", "2"], "LlamaForCausalLM has no image tokens"),
        (["--var", "auto"], "LlamaForCausalLM has no image tokens"),
        (["--spec", "nowhere.json"], "nowhere.json does not exist"),
        (["--image", "nowhere.png", "--vhr", "2"], "nowhere.png: No such file"),
        (["--scale", "0=0", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--scale", "0=0", "--chat"], "has no chat template"),
    ],
)
def test_refuses(model: Path, words: list[str], message: str) -> None:
    result = foveal(model, "--prompt", PROMPT, *words)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output and result.stdout == ""


def test_refuses_pictures_that_do_not_fit(model: Path, vlm: Path, picture: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no picture")
    cases: dict[str, tuple[object, ...]] = {
        "LlamaForCausalLM, which has no image tokens and reads no pictures": (model, "--image", picture, "--vhr", 2),
        "is no picture that Pillow can read": (vlm, "--image", broken, "--vhr", 2),
        "the prompt has 10 tokens and none is an image token": (vlm, "--vhr", 2),
        "ContextSteering names positions of the prompt, and VHR also runs": (vlm, "--image", picture, "--vhr", 2, "--context", 0.5),
        "no adapter at nowhere.safetensors": (tmp_path / "nowhere.safetensors", "--image", picture, "--vhr", 2),
        "no .safetensors file beside config.json": (tmp_path / "empty", "--image", picture, "--vhr", 2),
    }  # fmt: skip
    bare = tmp_path / "bare"
    shutil.copytree(vlm, bare, ignore=shutil.ignore_patterns("processor_config.json"))
    cases |= {
        "bare has no readable processor": (bare, "--image", picture, "--vhr", 2),
        "model 'smollm2' reads no pictures": ("smollm2", "--image", picture, "--vhr", 2),
        "small_vlm answers questions about a picture": ("small_vlm", "--vhr", 2),
        "small.safetensors answers questions about a picture": (tmp_path / "small.safetensors", "--vhr", 2),
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llava"}')
    for message, (name, *rest) in cases.items():
        result = foveal(name, "--prompt", "what colour is the cat ?", *rest)
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.stderr.split()), result.stderr
        assert "Traceback" not in result.output and result.stdout == ""
