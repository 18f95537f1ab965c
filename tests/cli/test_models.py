"""``foveal run``, ``foveal inspect`` and ``foveal tune`` as typed, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

pytest.importorskip("transformers", reason="needs the package transformers")
pytest.importorskip("gguf", reason="needs the package gguf")

from foveal.cli import app
from foveal.cli.tune import fraction
from foveal.core.errors import DataError
from foveal.hf.load import load_model
from foveal.patterns import Dense, SlidingWindow
from foveal.policies import ModelStamp, Policy, Rule

from ..hf.tiny_gguf import CONTEXT, LAYERS, write_tiny_folder

runner = CliRunner()
PROMPT = "the cat and the hat"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def policy(tmp_path: Path) -> Any:
    """Write a policy file and return its path."""

    def write(*args: Any, **kwargs: Any) -> str:
        path = tmp_path / "policy.json"
        Policy(*args, **kwargs).save(path)
        return str(path)

    return write


def foveal(*words: object) -> Result:
    return runner.invoke(app, [str(w) for w in words], env={"COLUMNS": "300"})


def greedy(model: Path, prompt: str, count: int) -> str:
    """What plain greedy decoding of the model gives."""
    loaded = load_model(model, device="cpu")
    ids = loaded.tokenizer(prompt).input_ids
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(loaded.tokenizer.decode(ids[-count:], skip_special_tokens=True))


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_decodes_greedily(model: Path) -> None:
    result = foveal("run", model, "--prompt", PROMPT, "--max-new-tokens", 12, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == greedy(model, PROMPT, 12).rstrip("\n")
    assert "prompt tokens in" in result.stderr and "the model's own attention" in result.stderr


def test_run_with_a_policy(model: Path, policy: Any) -> None:
    plain = foveal("run", model, "--prompt", PROMPT, "--max-new-tokens", 12).stdout
    dense = foveal("run", model, "--prompt", PROMPT, "--max-new-tokens", 12, "--policy", policy(name="mine"))
    assert dense.exit_code == 0, dense.output
    assert dense.stdout == plain and "with policy mine" in dense.stderr
    narrow = Policy.uniform(SlidingWindow(window=1))
    sparse = foveal("run", model, "--prompt", PROMPT, "--max-new-tokens", 12, "--policy", policy(narrow.default))
    assert sparse.exit_code == 0 and sparse.stdout != plain


def test_run_reads_files_and_standard_input(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    expected = foveal("run", model, "--prompt", PROMPT, "--max-new-tokens", 4).stdout
    assert foveal("run", model, "--file", file, "--max-new-tokens", 4).stdout == expected
    words = ["run", str(model), "--file", "-", "--max-new-tokens", "4"]
    assert runner.invoke(app, words, input=PROMPT).stdout == expected


def test_run_samples_reproducibly(model: Path) -> None:
    def sample(seed: int) -> str:
        result = foveal("run", model, "--prompt", PROMPT, "--max-new-tokens", 8, "--temperature", 2.0, "--seed", seed)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(3)}) > 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give exactly one of --prompt TEXT and --file FILE"),
        (["--prompt", "a", "--file", "b"], "give exactly one of --prompt TEXT and --file FILE"),
        (["--prompt", " "], "the prompt is empty"),
        (["--file", "nowhere.txt"], "nowhere.txt does not exist"),
        (["--prompt", "a" * 200], f"the prompt has 200 tokens, but tiny was made for at most {CONTEXT}"),
        (["--prompt", "a", "--policy", "nowhere.json"], "policy file nowhere.json does not exist"),
        (["--prompt", "a", "--chat"], "has no chat template; use --no-chat"),
        (["--prompt", "a", "--dtype", "float8"], "dtype is 'float8'"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature"),
    ],
)
def test_run_refuses(model: Path, words: list[str], message: str) -> None:
    result = foveal("run", model, *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.output and result.stdout == ""


def test_run_refuses_unknown_implementations(model: Path, policy: Any) -> None:
    result = foveal("run", model, "--prompt", "a", "--policy", policy(), "--impl", "gathr")
    assert result.exit_code == 2 and "impl='gathr' is unknown" in result.stderr


def test_run_refuses_foreign_policies(model: Path, policy: Any) -> None:
    deep = policy(layers=((LAYERS, Policy.uniform(Dense()).default),))
    assert f"the policy names layer {LAYERS}" in foveal("run", model, "--prompt", "a", "--policy", deep).stderr
    stamps = {
        "made for LlamaModel": ModelStamp("LlamaModel", LAYERS),
        "made for 3 layers": ModelStamp("LlamaForCausalLM", 3),
        "made for weights 0123": ModelStamp("LlamaForCausalLM", LAYERS, "0123" * 16),
    }
    for message, stamp in stamps.items():
        result = foveal("run", model, "--prompt", "a", "--policy", policy(model=stamp))
        assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    own = ModelStamp("LlamaForCausalLM", LAYERS, load_model(model, device="cpu").fingerprint)
    assert foveal("run", model, "--prompt", "a", "--max-new-tokens", 1, "--policy", policy(model=own)).exit_code == 0


def test_run_warns_outside_what_was_tested(model: Path, policy: Any) -> None:
    def warned(length: int, **about: Any) -> str:
        words = ("--prompt", "a" * length, "--max-new-tokens", 1, "--device", "cpu")
        result = foveal("run", model, *words, "--policy", policy(**about))
        assert result.exit_code == 0, result.output
        return result.stderr

    assert "warning: the prompt has 8 tokens, and the policy was tested at 64 tokens" in warned(8, context=(64, 64))
    assert "tested at 10 to 64 tokens" in warned(8, context=(10, 64))
    assert "tested at 2 to 7 tokens" in warned(8, context=(2, 7))
    assert "warning" not in warned(8, context=(8, 8), dtype="float32")
    assert "measured in bfloat16 and the model runs in float32" in warned(8, dtype="bfloat16")


def test_run_stays_inside_the_context(model: Path) -> None:
    result = foveal("run", model, "--prompt", "a" * (CONTEXT - 5), "--max-new-tokens", 50)
    assert result.exit_code == 0
    assert f"goes beyond the model's {CONTEXT} tokens; at most 5 are made" in result.stderr


def test_run_stops_at_nan_logits(model: Path, tmp_path: Path) -> None:
    loaded = load_model(model, device="cpu")
    with torch.no_grad():
        loaded.model.model.norm.weight.fill_(float("nan"))
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    result = foveal("run", tmp_path, "--prompt", "abc")
    assert result.exit_code == 2 and "the logits after token 3 are NaN" in result.stderr


def test_run_uses_the_chat_template(model: Path, tmp_path: Path) -> None:
    from foveal.cli.run import encode

    loaded = load_model(model, device="cpu")
    loaded.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    assert loaded.tokenizer.decode(encode(loaded, "hi", None)) == "<hi>A:"
    assert loaded.tokenizer.decode(encode(loaded, "hi", True)) == "<hi>A:"
    assert loaded.tokenizer.decode(encode(loaded, "hi", False)) == "hi"


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_prints_layers_and_heads(model: Path) -> None:
    result = foveal("inspect", model, "--context", 64, "--rows", 32, "--window", 8)
    assert result.exit_code == 0, result.output
    assert "Attention over 64 tokens" in result.stdout
    heads = foveal("inspect", model, "--context", 64, "--rows", 32, "--layer", 1)
    assert heads.exit_code == 0 and "Layer 1, 4 heads on 2 key heads, 64 tokens" in heads.stdout


def test_inspect_writes_every_figure(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the package matplotlib")
    json_file, plot_file = tmp_path / "p.json", tmp_path / "p.png"
    result = foveal("inspect", model, "--context", 48, "--rows", 16, "--json", json_file, "--plot", plot_file)
    assert result.exit_code == 0, result.output
    written = json.loads(json_file.read_text())
    assert written["tokens"] == 48 and len(written["layers"]) == LAYERS
    assert written["model"] == "tiny" and written["provenance"]["foveal"]
    assert plot_file.read_bytes().startswith(b"\x89PNG")
    assert str(json_file) in result.stdout and str(plot_file) in result.stdout


def test_inspect_refuses(model: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--context", CONTEXT + 1], f"context is {CONTEXT + 1}, but tiny was made for at most {CONTEXT} tokens"),
        (["--context", 32, "--layer", LAYERS], f"layer is {LAYERS}, but tiny has the layers 0 to {LAYERS - 1}"),
        (["--context", 32, "--plot", tmp_path / "p.doc"], "Format 'doc' is not supported"),
        (["--text", "nowhere.txt"], "nowhere.txt does not exist"),
    ):
        result = foveal("inspect", model, *words)
        assert result.exit_code == 2 and message in result.stderr
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert (
        "text has 9 tokens; expected at least 64" in foveal("inspect", model, "--text", short, "--context", 64).stderr
    )


def test_inspect_writes_a_report(model: Path, tmp_path: Path, policy: Any) -> None:
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    pytest.importorskip("scipy", reason="needs the package scipy")
    from foveal.lens import load

    page, arrays = tmp_path / "r.html", tmp_path / "r.safetensors"
    words = ("--report", page, "--probes", "received, norms", "--arrays", arrays)
    file = policy(name="narrow", default=Rule(SlidingWindow(window=8)))
    result = foveal("inspect", model, "--context", 64, "--rows", 16, *words, "--compare", file)
    assert result.exit_code == 0, result.output
    assert str(page) in result.stdout and str(arrays) in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "foveal inspect · tiny · 64 tokens" in text and "What narrow drops" in text and "norms.value" in text
    found = load(arrays)
    assert found["received"].shape == (LAYERS, 4, 64) and found["compared.lost.mass"].shape == (LAYERS, 4, 64)
    result = foveal("inspect", model, "--prompt", PROMPT, "--rows", 4, "--report", page)
    assert result.exit_code == 0 and "tokens · the prompt" in page.read_text(encoding="utf-8")


def test_inspect_refuses_before_it_measures(model: Path, tmp_path: Path) -> None:
    for words, message in (
        (["--probes", "entropi"], "unknown probe 'entropi'. Did you mean 'entropy'?"),
        (["--compare", tmp_path / "no.json"], "no.json"),
        (["--prompt", "a"], "the prompt has 1 token; expected at least 2"),
        (["--prompt", "a" * (CONTEXT + 1)], f"made for at most {CONTEXT} tokens"),
        (["--context", 32, "--probes", "lost"], "--compare POLICY"),
        (["--context", 32, "--probes", "importance"], "needs a backward pass"),
    ):
        result = foveal("inspect", model, *words, "--report", tmp_path / "r.html")
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert not (tmp_path / "r.html").exists()


def test_inspect_shows_circuits(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    pytest.importorskip("scipy", reason="needs the package scipy")
    from foveal.lens import load

    from ..lens.tiny_tasks import HEADS, LAYERS, save_task_model

    folder = save_task_model(tmp_path / "tasks")
    page, arrays, figures = (tmp_path / name for name in ("r.html", "r.safetensors", "r.json"))
    words = (
        "--report",
        page,
        "--arrays",
        arrays,
        "--json",
        figures,
        "--circuits",
        "ioi, colored_objects",
        "--pairs",
        4,
    )
    result = foveal("inspect", folder, "--context", 48, "--rows", 8, *words)
    assert result.exit_code == 0, result.output
    assert "ioi: paths of the movers" in result.stderr and f"{page} stands; searching circuits" in result.stderr
    text = page.read_text(encoding="utf-8")
    assert "Heads that ioi and colored_objects share" in text and "% of 4 prompts" in text
    assert load(arrays)["circuits.ioi.movers"].shape == (LAYERS, HEADS, 4)
    written = json.loads(figures.read_text())
    assert [task["task"] for task in written["circuits"]["tasks"]] == ["ioi", "colored_objects"] and written["layers"]
    prompt = "Then Mary and John met, and John gave a book to"
    words = ("--report", page, "--circuits", "ioi", "--dtype", "bfloat16")
    result = foveal("inspect", folder, "--prompt", prompt, "--rows", 4, *words)
    assert result.exit_code == 0, result.output
    assert "effects below about 0.001 are noise" in result.stderr
    assert "% of 1 prompt " in page.read_text(encoding="utf-8")


def test_an_interrupt_in_the_circuits_leaves_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2", reason="needs the package jinja2")
    pytest.importorskip("scipy", reason="needs the package scipy")
    from foveal.lens import circuit_survey

    from ..lens.tiny_tasks import save_task_model

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(circuit_survey, "survey_circuit", stop)
    page = tmp_path / "r.html"
    result = foveal(
        "inspect",
        save_task_model(tmp_path / "tasks"),
        "--context",
        32,
        "--rows",
        4,
        "--report",
        page,
        "--circuits",
        "ioi",
    )
    assert result.exit_code != 0 and "Head atlas" in page.read_text(encoding="utf-8")


def test_inspect_refuses_circuits_before_it_measures(model: Path, tmp_path: Path) -> None:
    from ..lens.tiny_tasks import save_task_model

    short, tasks = (save_task_model(tmp_path / str(limit), limit=limit) for limit in (16, 128))
    for folder, words, message in (
        (model, ["--circuits", "iou"], "circuits names the task 'iou'. Did you mean 'ioi'?"),
        (model, ["--circuits", ","], "circuits names no task; expected one or more of ioi, colored_objects"),
        (model, ["--circuits", "ioi", "--context", 32], "only 0 of the names are single tokens"),
        (model, ["--circuits", "ioi", "--prompt", "nobody is here"], "there is no subject to patch"),
        (model, ["--circuits", "colored_objects", "--prompt", "what color"], "builds its own prompts"),
        (short, ["--circuits", "colored_objects", "--context", 8], "was made for at most 16; choose another model"),
        (tasks, ["--circuits", "ioi", "--pairs", 0], "--pairs"),
        (tasks, ["--circuits", "ioi", "--prompt", "Mary met John, and Mary saw John"], "there is no subject to patch"),
    ):
        result = foveal("inspect", folder, *words, "--report", tmp_path / "r.html")
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert not (tmp_path / "r.html").exists() and "Traceback" not in result.output
        assert "Attention over" not in result.stdout, "refused before anything is measured"


# --- tune -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02), (" 10% ", 0.1)])
def test_fraction(text: str, value: float) -> None:
    assert fraction(text) == pytest.approx(value)


def test_tune_passes_every_option_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import foveal.tune as tune

    seen = []

    def stop(options: Any, report: Any, say: Any) -> None:
        report("measuring", 1, 2)
        say("loading")
        seen.append(options)
        raise DataError("enough")

    monkeypatch.setattr(tune, "run_tune", stop)
    result = foveal(
        "tune", "m", "--context", 512, "--text", "t.txt", "--out", tmp_path, "--max-ppl-increase", "2%", "--dtype", "bfloat16",
        "--device", "cpu", "--impl", "gather", "--seed", 7, "--decode-tokens", 32, "--no-search", "--trust-remote-code",
        "--patterns", "moba, xattention",
    )  # fmt: skip
    assert result.exit_code == 2 and "error: enough" in result.stderr
    assert "[1/2] measuring" in result.stderr and "loading" in result.stderr
    expected = tune.TuneOptions(
        "m", 512, "t.txt", str(tmp_path), 0.02, "bfloat16", "cpu", "gather", 7, 32, search=False, trust_remote_code=True,
        patterns=("moba", "xattention"),
    )  # fmt: skip
    assert seen == [expected]
    foveal("tune", "m")
    assert seen[-1] == tune.TuneOptions("m")


def test_tune_refuses_bad_options() -> None:
    result = foveal("tune", "m", "--context", 10)
    assert result.exit_code == 2 and "context is 10" in result.stderr
    assert foveal("tune", "m", "--max-ppl-increase", "much").exit_code == 2
