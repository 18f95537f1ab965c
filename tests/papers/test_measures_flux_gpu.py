"""Flux's measures that need a GPU, at a tiny size on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.models.blocks import Pass
from foveal.papers.measures import flux_gpu
from foveal.papers.measures.gpu import drawn, error
from foveal.patterns import SlidingWindow
from foveal.policies import Policy
from tests.papers.planted import CPU, planted, stored

SPARSE = SlidingWindow(16, 8, block=8)
MODEL: dict[str, Any] = {**CPU, "dim": 32, "heads": 4, "kv_heads": 2, "sparse": SPARSE}
STEP: dict[str, Any] = {**MODEL, "depth": 4, "batch": 2, "length": 100}


def test_forced_shares_are_spread() -> None:
    def sparse(share: float) -> list[int]:
        return [i for i, rule in flux_gpu.forced(8, share).layers if rule.prefill == flux_gpu.SPARSE]

    assert [len(sparse(share)) for share in flux_gpu.SHARES] == [0, 2, 4, 6, 8]
    assert sparse(0.25) == [3, 7] and sparse(0.5) == [1, 3, 5, 7]


def test_prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**MODEL, "depth": 4, "lengths": (64, 128), "checked": 70}
    result = flux_gpu.measure_prefill(out=tmp_path, **shape)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)

    def found(times: dict[str, float]) -> dict[str, Any]:
        planted(monkeypatch, lambda name, _: times[name])
        return flux_gpu.measure_prefill(out=tmp_path, **shape)

    line = {"0": 1.0, "0.25": 0.9, "0.5": 0.8, "0.75": 0.7, "1": 0.6}
    good = found(line)
    assert good["verdict"] == "reproduced" and good["measured"]["largest_distance_from_the_line"] < 1e-3
    off = found(line | {"0.5": 0.96})
    assert off["verdict"] == "direction holds" and off["measured"]["largest_distance_from_the_line"] == 0.2
    assert found({name: 1.1 if name == "1" else 1.0 for name in line})["verdict"] == "not reproduced"


def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = flux_gpu.measure_decode(out=tmp_path, **STEP)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)

    def verdict(half: float) -> str:
        planted(monkeypatch, lambda name, _: half if name == "0.5" else 1.0)
        return flux_gpu.measure_decode(out=tmp_path, **STEP)["verdict"]

    assert [verdict(x) for x in (0.7, 0.8, 1.1)] == ["reproduced", "direction holds", "not reproduced"]


def test_layers_against_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = flux_gpu.measure_heads(out=tmp_path, **STEP)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)

    def verdict(head: float) -> str:
        planted(monkeypatch, lambda name, _: head if name == "head" else 1.0)
        return flux_gpu.measure_heads(out=tmp_path, **STEP)["verdict"]

    assert verdict(1.0) == "reproduced" and verdict(0.9) == "not reproduced"


def test_half_of_the_heads_are_dense_and_half_sparse() -> None:
    q, k, v = drawn(4, 100, 8, "cpu", torch.float32, kv_heads=2, q_len=1)
    base = BaseMask.build(1, 100, causal=True)
    run = Pass(Policy.uniform(SPARSE), base, torch.zeros(1, 1), 1)
    out = flux_gpu._half_of_the_heads(SPARSE, run, 0, q, q, k, v)
    layout = SPARSE.select(q, k, SelectContext(base))[0]
    assert error(out[:, :2], q[:, :2], k[:, :1], v[:, :1], None, base) < 1e-5
    assert error(out[:, 2:], q[:, 2:], k[:, 1:], v[:, 1:], layout, base) < 1e-5
    assert error(out[:, 2:], q[:, 2:], k[:, 1:], v[:, 1:], None, base) > 1e-3


def test_router(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**MODEL, "lengths": (32, 64), "pool": 4}
    result = flux_gpu.measure_router(out=tmp_path, **shape)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)

    def verdict(*router: float) -> str:
        planted(monkeypatch, lambda name, size: router[size] if name == "router" else 1.0)
        return flux_gpu.measure_router(out=tmp_path, **shape)["verdict"]

    assert verdict(0.05, 0.01) == "reproduced"
    assert verdict(0.2, 0.05) == "direction holds" and verdict(0.2, 0.1) == "not reproduced"
