"""Measures of decode steps that need a GPU, at a tiny size on CPU; see ``test_measures_gpu``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.models import DecoderLM, Memory
from foveal.papers.measures import hylra_gpu, kinetics_gpu
from foveal.papers.measures.gpu import drawn
from foveal.papers.measures.gpu_decode import Decoding
from foveal.patterns.topk import BlockTopK
from tests.papers.planted import CPU, planted, stored


def test_a_step_in_place_is_a_step_of_the_backbone() -> None:
    model = Decoding(32, 2, 4, 2, 2, 9, "cpu", torch.float32)
    keys, values = ({i: model.cache(i)[part][:, :, :-1].clone() for i in range(2)} for part in (0, 1))
    plain = DecoderLM(512, 32, 2, 4, 2).eval()
    plain.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        expected = plain(model.ids, memory=Memory(keys, values))
    torch.testing.assert_close(model.step(None), expected)


def test_a_step_changes_no_state() -> None:
    policy = BlockTopK(Budget(tokens=12), kv_block=4)
    model = Decoding(32, 2, 4, 2, 2, 40, "cpu", torch.float32)
    states = model.states(policy)
    assert states[0].absorbed == 39  # one key less than the step sees, so that it adds its own alone
    first = model.step(policy, states)
    assert states[0].absorbed == 39
    torch.testing.assert_close(model.step(policy, states), first)


def test_elements_of_block_topk() -> None:
    assert kinetics_gpu.elements(32768, 16, 64) == (65536, 2 * 1040 + 2047)
    assert kinetics_gpu.elements(8192, 16, 15) == (16384, 2 * 256 + 511)  # a budget of 256 at 8K


def test_kinetics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {**CPU, "batches": (1, 2), "length": 200, "heads": 4, "kv_heads": 2, "head_dim": 16, "page": 8, "pages": 3}
    result = kinetics_gpu.measure_throughput(out=tmp_path, **shape)
    assert result["measured"]["difference"] < 1e-5 and stored(tmp_path, result)
    assert result["measured"]["elements"] == {"dense": 400, "formula": 88, "touched": 88}  # 2·(3·8 + 8) + 24

    def verdict(*gains: float) -> str:
        planted(monkeypatch, lambda name, size: 1.0 if name == "dense" else 1 / gains[size])
        return kinetics_gpu.measure_throughput(out=tmp_path, **shape)["verdict"]

    assert verdict(2.3, 3.0) == "reproduced"
    assert verdict(3.0, 2.2) == "direction holds" and verdict(3.0, 0.9) == "not reproduced"


def test_the_state_of_many_sequences_is_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = drawn(4, 50, 8, "cpu", torch.float32, kv_heads=2, batch=3, q_len=1)
    pattern, ctx = BlockTopK(Budget(tokens=12), kv_block=4), SelectContext(BaseMask.build(1, 50, causal=True))
    whole = pattern.select(q, k, ctx)[1]
    monkeypatch.setattr(kinetics_gpu, "SEQUENCES", 2)
    parts = kinetics_gpu._state(pattern, q, k, ctx)
    assert torch.equal(parts.sums, whole.sums) and torch.equal(parts.counts, whole.counts)
    assert (parts.absorbed, parts.origin) == (whole.absorbed, whole.origin)


def test_hylra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape: dict[str, Any] = {
        **CPU, "batch": 2, "length": 200, "dim": 32, "depth": 7, "heads": 4, "kv_heads": 2, "kept": 24, "chunk": 8,
    }  # fmt: skip
    result = hylra_gpu.measure_throughput(out=tmp_path, **shape)
    measured = result["measured"]
    assert measured["difference"] < 1e-5 and stored(tmp_path, result)
    assert measured["roles"] == {"full": 1, "compute": 3, "reuse": 3}
    assert measured["keys_per_layer"].count(200) == 1 and max(measured["keys_per_layer"][1:]) <= 24

    def found(attention: float, steps: float) -> str:
        planted(monkeypatch, lambda name, call: 1.0 if name == "dense" else 1 / (attention, steps)[call])
        return hylra_gpu.measure_throughput(out=tmp_path, **shape)["verdict"]

    enough = 0.61 * measured["fewer_keys"]
    assert found(enough, 1.1) == "reproduced"
    assert found(0.9 * enough, 1.1) == "direction holds" and found(enough, 1.05) == "direction holds"
    assert found(enough, 0.9) == "not reproduced"
