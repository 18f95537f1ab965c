"""Measures of whole layers and models that need a GPU, at a tiny size on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.papers.measures import eca_gpu, fna_models, scatterformer_gpu
from tests.papers.planted import CPU, planted, stored


def test_fna_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**CPU, "batch": 2, "side": 8, "dim": 16, "depth": 2, "heads": 2, "window": 3}
    result = fna_models.measure_throughput(out=tmp_path, **shape)
    assert result["measured"]["difference"] < 1e-5 < result["measured"]["size_of_logits"] and stored(tmp_path, result)

    def verdict(gemm: float, fused: float) -> str:
        planted(monkeypatch, lambda name, _: {"naive": 1.0, "gemm": gemm, "fused": fused}[name])
        return fna_models.measure_throughput(out=tmp_path, **shape)["verdict"]

    assert verdict(0.9, 0.9) == "reproduced"
    assert verdict(0.8, 0.9) == "direction holds" and verdict(0.8, 1.1) == "not reproduced"
    monkeypatch.setattr(fna_models, "EQUAL", -1.0)
    assert verdict(0.9, 0.9) == "not reproduced", "logits differ"


def test_forms_are_swapped() -> None:
    model = fna_models.NatLike(16, 1, 2, 3)
    model(torch.zeros(1, 3, 16, 16), "gemm")
    assert model.attentions[0].form == "gemm"


SCATTER: dict[str, Any] = {**CPU, "voxels": 200, "sizes": (64, 300), "dim": 16, "heads": 2}


def test_windows_of_voxels() -> None:
    ids = scatterformer_gpu.window_ids(1000)
    assert len(ids) == 1000 and bool((ids.diff() >= 0).all()) and 30 < int(ids[-1]) < 300


def test_scatterformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = scatterformer_gpu.measure_time(out=tmp_path, **SCATTER)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)

    def verdict(layer_ms: float, packed: float, less: float) -> str:
        planted(monkeypatch, lambda name, _: {"layer": layer_ms / 1e3, "naive": 1.0, "packed": packed}[name])
        memory = iter([1.0, 1.0, less, 1.0])
        monkeypatch.setattr(scatterformer_gpu, "peak", lambda job, device: next(memory))
        return scatterformer_gpu.measure_time(out=tmp_path, **SCATTER)["verdict"]

    assert verdict(0.9, 0.2, 10.0) == "reproduced"
    assert verdict(1.1, 0.2, 10.0) == "direction holds" == verdict(0.9, 0.3, 10.0) == verdict(0.9, 0.2, 9.0)
    assert verdict(0.9, 1.2, 10.0) == "not reproduced"


def test_eca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**CPU, "batch": 2, "side": 32, "blocks": (1, 1, 1, 1), "width": 16}
    result = eca_gpu.measure_throughput(out=tmp_path, **shape)
    assert result["measured"]["added_parameters"]["ECA"] == 3 + 5 + 5 + 7 and stored(tmp_path, result)

    def verdict(eca: float, se: float) -> str:
        planted(monkeypatch, lambda name, _: {"plain": 1.0, "ECA": 1 / eca, "SE": 1 / se}[name])
        return eca_gpu.measure_throughput(out=tmp_path, **shape)["verdict"]

    assert verdict(0.94, 0.9) == "reproduced"
    assert verdict(0.92, 0.9) == "direction holds" and verdict(0.94, 0.95) == "not reproduced"


def test_gates_are_the_only_difference() -> None:
    nets = eca_gpu.networks("cpu", torch.float32, (1, 1, 1, 1), 16)
    assert torch.equal(nets["plain"].conv1.weight, nets["ECA"].conv1.weight)
    assert torch.equal(nets["plain"].fc.weight, nets["SE"].fc.weight)


def test_vhr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from foveal.papers.measures import vhr_gpu

    shape = {
        **CPU, "dim": 32, "layers": 2, "heads": 4, "vision_dim": 32, "vision_layers": 1, "side": 28, "words": 4, "tokens": 6,
    }  # fmt: skip
    result = vhr_gpu.measure_cost(out=tmp_path, **shape)
    assert result["measured"]["share_of_equal_tokens_at_alpha_1"] == 1.0 and stored(tmp_path, result)
    assert result["measured"]["prompt"] == 1 + 4 + 4

    def verdict(extra: float) -> str:
        planted(monkeypatch, lambda name, _: {"greedy": 11.0, "vhr": 11.0 + extra, "prefill": 1.0}[name])
        return vhr_gpu.measure_cost(out=tmp_path, **shape)["verdict"]

    assert verdict(1.79) == "reproduced"  # 1.5·1 + 0.03·10 = 1.8
    assert verdict(1.9) == "direction holds" and verdict(8.1) == "not reproduced"
