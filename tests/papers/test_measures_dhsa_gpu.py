"""DHSA's measures that need a GPU, at a tiny size on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.core.budget import Budget
from foveal.papers.measures import dhsa_gpu
from foveal.patterns.dhsa import DHSA
from tests.papers.planted import CPU, planted, stored

PATTERN = DHSA(Budget(tokens=48), variant="chunk", q_block=16, local=16, sinks=8, instruction=8, chunk=8)
SHAPE: dict[str, Any] = {**CPU, "heads": 4, "kv_heads": 2, "head_dim": 16, "pattern": PATTERN, "lengths": (96, 128)}


def test_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = dhsa_gpu.measure_time(out=tmp_path, **SHAPE)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)

    def found(*times: float) -> tuple[str, int | None]:
        planted(monkeypatch, lambda name, size: times[size] if name == "dhsa" else 1.0)
        result = dhsa_gpu.measure_time(out=tmp_path, **SHAPE)
        return result["verdict"], result["measured"]["crossover"]

    assert found(0.9, 0.5) == ("reproduced", 96)
    assert found(1.1, 0.9) == ("direction holds", 128)
    assert found(1.3, 1.1) == ("not reproduced", None)


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "repeats"} | {"stored_up_to": 96}

    def found(dhsa: float, storing: float) -> dict[str, Any]:
        names = iter(["dhsa", "sdpa", "storing", "dhsa", "sdpa"])

        def fixed(job: Any, device: str) -> float:
            job()
            return {"dhsa": dhsa, "sdpa": 1.0, "storing": storing}[next(names)]

        monkeypatch.setattr(dhsa_gpu, "peak", fixed)
        return dhsa_gpu.measure_memory(out=tmp_path, **shape)

    good = found(2.0, 4.0)
    assert good["verdict"] == "reproduced" and good["measured"]["over_storing"] == 0.5 and stored(tmp_path, good)
    assert good["measured"]["difference"] < 1e-5
    assert list(good["measured"]["peak_mib"]["128"]) == ["dhsa", "sdpa"], "scores are not stored at every length"
    assert found(5.0, 4.0)["verdict"] == "not reproduced"


def test_attention_that_stores_its_scores_needs_them() -> None:
    q, k, v = dhsa_gpu.gpu.drawn(4, 512, 8, "cpu", torch.float32, kv_heads=2)
    torch.testing.assert_close(dhsa_gpu._storing(q, k, v), dhsa_gpu._dense(q, k, v), atol=1e-5, rtol=1e-5)
    assert dhsa_gpu.peak(lambda: dhsa_gpu._storing(q, k, v), "cpu") >= 4 * 512 * 512 * 4 / 2**20


def test_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**CPU, "heads": 4, "kv_heads": 2, "head_dim": 16, "length": 640, "checked": 300, "density": 0.5}
    result = dhsa_gpu.measure_long(out=tmp_path, **shape)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)
    assert 0.3 < result["measured"]["density"] < 0.95

    def verdict(time: float) -> str:
        planted(monkeypatch, lambda name, _: time if name == "dhsa" else 1.0)
        return dhsa_gpu.measure_long(out=tmp_path, **shape)["verdict"]

    assert verdict(1.0) == "reproduced" and verdict(1.1) == "not reproduced"
    shape["density"] = 0.25
    assert verdict(0.5) == "reproduced" and verdict(0.6) == "direction holds"
