"""Measures that need a GPU, at a tiny size on CPU: what does not depend on time, and verdicts from planted times."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.papers import cards
from foveal.papers.cards import Claim
from foveal.papers.measures import clear_gpu, gpu, rettention_gpu, sparsed_gpu, vmoba_gpu
from foveal.papers.reproduce import measure_of, reproduce
from tests.papers.planted import CPU, planted, stored


def test_an_error_is_seen() -> None:
    q, k, v = gpu.drawn(2, 9, 8, "cpu", torch.float32)
    base = gpu.BaseMask.build(9, 9, causal=True)
    right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert gpu.error(right, q, k, v, None, base) < 1e-5
    wrong = right.clone()
    wrong[0, 1, 4, 3] += 0.5
    assert gpu.error(wrong, q, k, v, None, base) == pytest.approx(0.5, abs=1e-4)
    assert gpu.error(wrong, q, k, v, None, base, heads=1) < 1e-5
    assert (
        gpu.verdict(True, True, difference=0.5) == "not reproduced" == gpu.verdict(True, True, difference=float("nan"))
    )


ON_GPU = [claim for card in cards().values() for claim in card.claims if claim.scale == "one GPU" and claim.measured_by]


def test_a_machine_without_a_gpu_refuses_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(ON_GPU) >= 24
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for claim in ON_GPU:
        outcome = next(reproduce(claim.slug, claim.id, out=tmp_path))
        assert outcome.result is None and outcome.why_not == "needs a CUDA GPU, and torch sees none here"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("claim", ON_GPU, ids=lambda c: f"{c.slug}/{c.id}")
def test_defaults_are_those_of_a_gpu(claim: Claim) -> None:
    known = inspect.signature(measure_of(claim)).parameters
    assert "device" not in known or known["device"].default == "cuda"
    assert "dtype" not in known or known["dtype"].default == torch.bfloat16


def test_times_are_those_of_the_same_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, lambda name, _: {"dense": 0.02, "ours": 0.005}[name])
    row = gpu.timed({"dense": lambda: None, "ours": lambda: None}, 3, "cpu")
    assert row == {"ms": {"dense": 20.0, "ours": 5.0}, "ratio": {"dense": 1.0, "ours": 0.25}}


CLEAR: dict[str, Any] = {**CPU, "sides": (8, 16), "radii": (2, 3), "judged": 2, "text": 16, "heads": 2, "head_dim": 16, "tile": (4, 4)}  # fmt: skip


def test_clear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = clear_gpu.measure_speed(out=tmp_path, **CLEAR)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)
    inside = (8 + 7 + 7) ** 2  # a disc of radius 2 is 3×3 tokens
    assert result["measured"]["rows"]["8²"]["pairs"]["r = 2"] == round((16 * 80 + 64 * 16 + inside) / 80**2, 4)

    def verdict(small: float, large: float, dense: float = 12.0) -> str:
        planted(monkeypatch, lambda name, size: (1.0, dense)[size] if name == "dense" else (small, large)[size])
        return clear_gpu.measure_speed(out=tmp_path, **CLEAR)["verdict"]

    assert verdict(0.6, 3.0) == "reproduced"
    assert verdict(0.7, 3.0) == "direction holds", "too slow at the smaller size"
    assert verdict(0.6, 3.1, dense=11.0) == "direction holds", "dense did not grow as claimed"
    assert verdict(0.6, 13.0) == "not reproduced"


def test_rettention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**CPU, "text": 10, "frames": 3, "places": 20, "heads": 2, "head_dim": 16, "keep": 0.2}
    result = rettention_gpu.measure_latency(out=tmp_path, **shape)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)
    assert (
        result["measured"]["steps"] == {"full": 15, "refresh": 7, "sparse": 28} and result["measured"]["tokens"] == 70
    )

    def found(sparse: float) -> dict[str, Any]:
        planted(monkeypatch, lambda name, _: {"sparse": sparse, "refresh": 1.5}.get(name, 1.0))
        return rettention_gpu.measure_latency(out=tmp_path, **shape)

    good = found(0.25)
    assert good["verdict"] == "reproduced" and good["measured"]["whole_run_ratio"] == (22 + 35 * 0.25) / 50
    assert good["measured"]["whole_run_ratio_with_timed_refreshes"] == (15 + 7 * 1.5 + 28 * 0.25) / 50
    assert found(0.3)["verdict"] == "direction holds" and found(1.1)["verdict"] == "not reproduced"


SPARSED: dict[str, Any] = {**CPU, "dim": 32, "depth": 2, "heads": 2, "answer": 8, "block": 4, "at_a_time": 4}


def test_sparsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**SPARSED, "lengths": (24, 40), "steps": 10}
    result = sparsed_gpu.measure_latency(out=tmp_path, **shape)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)
    assert result["measured"]["rows"]["24"]["dense_steps"] == 4  # ⌊0.2·10⌋ + 1 is the last of them, from step 0

    def found(sparse: float, whole: float) -> dict[str, Any]:
        step = {"dense": 1.0, "mask": 3.0, "sparse": sparse}
        planted(monkeypatch, lambda name, call: step[name] if call % 2 == 0 else {"dense": 10.0, "sparse": whole}[name])
        return sparsed_gpu.measure_latency(out=tmp_path, **shape)

    good = found(0.5, 9.0)  # 4 + 6·0.5 + 2 = 9 of 10
    assert good["verdict"] == "reproduced" and good["measured"]["largest_error_of_prediction"] == 0
    assert good["measured"]["crossover"] == 24
    assert found(0.5, 8.0)["verdict"] == "direction holds", "the prediction is off"
    assert found(0.7, 9.5)["verdict"] == "direction holds", "a step is too slow"
    slow = found(0.5, 11.0)
    assert slow["verdict"] == "not reproduced" and slow["measured"]["crossover"] is None


def test_sparsed_with_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**SPARSED, "length": 24, "steps": (10, 20)}
    assert stored(tmp_path, sparsed_gpu.measure_steps(out=tmp_path, **shape))

    def verdict(few: float, many: float) -> str:
        step = {"dense": 1.0, "mask": 3.0, "sparse": 0.5}
        whole = {1: {"dense": 10.0, "sparse": few}, 3: {"dense": 20.0, "sparse": many}}
        planted(monkeypatch, lambda name, call: whole[call][name] if call % 2 else step[name])
        return sparsed_gpu.measure_steps(out=tmp_path, **shape)["verdict"]

    assert verdict(9.0, 15.0) == "reproduced"  # 6 + 14·0.5 + 2 = 15 of 20
    assert verdict(9.0, 12.0) == "direction holds" and verdict(7.0, 15.0) == "not reproduced"


def test_vmoba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = ((1, 0, 0), (0, 2, 2), (2, 2, 2))
    shape = {**CPU, "settings": {"16": ((2, 2, 4), blocks), "32": ((2, 4, 4), blocks)}, "heads": 2, "head_dim": 8}
    result = vmoba_gpu.measure_crossover(out=tmp_path, **shape)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)
    assert all(0 < kept < 1 for kept in result["measured"]["rows"]["32"]["kept"].values())

    def found(short: float, long: float, choosing: float = 0.1) -> dict[str, Any]:
        planted(
            monkeypatch,
            lambda name, call: 1.0 if name == "dense" else choosing if name[0] == "c" else (short, long)[call],
        )
        return vmoba_gpu.measure_crossover(out=tmp_path, **shape)

    good = found(0.9, 0.8)
    assert good["verdict"] == "reproduced" and good["measured"]["crossover"] == "16"
    assert good["measured"]["rows"]["32"]["times_faster"] == 1.25
    assert found(1.1, 0.8)["verdict"] == "direction holds", "the crossover is not below the longest"
    assert found(0.9, 0.8, 0.3)["verdict"] == "direction holds", "choosing takes too much of the time"
    assert found(0.9, 1.1)["verdict"] == "not reproduced"
