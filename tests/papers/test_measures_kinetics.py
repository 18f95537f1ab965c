"""Kinetics' claims: verdicts follow from figures, and the timed steps are the ones that the law counts."""

from __future__ import annotations

import json
import random

import pytest
import torch
from torch.nn.functional import pad

from foveal.models.blocks import Memory
from foveal.models.decoder_lm import DecoderLM
from foveal.papers.measures import kinetics
from foveal.policies.kinetics_fit import Step, step_work


def test_arithmetic_claims_are_reproduced(tmp_path):
    for measure, claim in (
        (kinetics.measure_golden, "cost-model-golden-values"),
        (kinetics.measure_ratios, "kv-dominates"),
    ):
        result = measure(out=tmp_path)
        assert result["verdict"] == "reproduced"
        assert json.loads((tmp_path / "kinetics" / f"{claim}.json").read_text()) == result


def test_a_wrong_figure_is_not_reproduced(tmp_path, monkeypatch):
    monkeypatch.setattr(kinetics, "GOLDEN", (*kinetics.GOLDEN[:-1], (*kinetics.GOLDEN[-1][:3], 19260.0)))
    assert kinetics.measure_golden(out=tmp_path)["verdict"] == "not reproduced"
    monkeypatch.setitem(kinetics.RATIOS, "8b", "21.6")
    assert kinetics.measure_ratios(out=tmp_path)["verdict"] == "direction holds"


def test_a_step_decodes_after_the_given_cache():
    """Keys of a real prefix, with room for one more token, give the logits of the whole sequence; and a step repeats itself."""
    model, shape = kinetics.backbone(32, 2, 4, 2)
    usual = DecoderLM(kinetics.VOCAB, 32, 2, 4, 2, seed=5).eval()
    usual.load_state_dict(model.state_dict())
    ids = torch.randint(kinetics.VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        memory = Memory()
        usual(ids[:, :-1], memory=memory)
        room = Memory(*({i: pad(x, (0, 0, 0, 1)) for i, x in part.items()} for part in (memory.keys, memory.values)))
        assert torch.allclose(kinetics.decode(model, ids[:, -1:], room)[:, -1], usual(ids)[:, -1], atol=1e-5)
        step = kinetics.decoder(model, shape, batch=3, context=17)
        first = step()
        assert first.shape == (3, 1, kinetics.VOCAB) and torch.equal(first, step())


def made(alpha: float, beta: float, noise: float = 0.0) -> dict[str, list[Step]]:
    rng = random.Random(0)
    out = {}
    for size in kinetics.SIZES[:3]:
        _, shape = kinetics.backbone(*size)
        works = [step_work(shape, batch=8, context=c, kv_bytes=4, weight_bytes=4) for c in (128, 1024, 8192)]
        out[shape.name] = [Step(f, b, (alpha * f + beta * b) * (1 + noise * rng.random())) for f, b in works]
    return out


def test_verdicts_follow_from_the_times():
    verdict, numbers = kinetics.judge(made(1e-12, 1e-9))
    assert verdict == "reproduced" and numbers["r2"] == 1.0
    assert numbers["gflop_per_s"] == pytest.approx(1000) and numbers["gb_per_s"] == pytest.approx(1)
    assert kinetics.judge(made(1e-9, 0.0, noise=0.2))[0] != "reproduced", "FLOPs alone explain these as well"


def test_the_timed_claim_at_a_small_size(tmp_path, monkeypatch):
    monkeypatch.setattr(kinetics, "SIZES", ((32, 1, 2, 2), (64, 2, 4, 1)))
    monkeypatch.setattr(kinetics, "CONTEXTS", (16, 64, 256, 512))
    result = kinetics.measure_times(repeats=2, seed=3, out=tmp_path)
    assert result["seed"] == 3 and result["measured"]["contexts"] == [16, 64, 256, 512]
    assert {len(rows) for rows in result["measured"]["steps"].values()} == {4} and result["verdict"]
