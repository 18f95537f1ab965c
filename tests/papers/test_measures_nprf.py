"""NPRF's claims: what is measured is what is said, and the result files are what the card reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveal.kernels.toeplitz_attention import toeplitz_attention_reference
from foveal.papers.cards import load_card
from foveal.papers.measures import nprf_rpe


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nprf_rpe, "KEYS", 64)
    monkeypatch.setattr(nprf_rpe, "FAST_LENGTHS", (64, 128))
    monkeypatch.setattr(nprf_rpe, "DENSE_LENGTHS", (64, 128))
    monkeypatch.setattr(nprf_rpe, "COUNTS", (16, 32))
    monkeypatch.setattr(nprf_rpe, "DRAWS", 1)


def test_the_dense_side_is_softmax_with_the_bias() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 9, 4, generator=g, dtype=torch.float64) for _ in range(3))
    c = torch.rand(1, 17, generator=g, dtype=torch.float64)
    table = c.log()[0]
    logits = torch.stack(
        [torch.stack([q[0, 0, i] @ k[0, 0, j] + table[j - i + 8] for j in range(9)]) for i in range(9)]
    )
    torch.testing.assert_close(nprf_rpe.dense(q, k, v, c)[0, 0], torch.softmax(logits, -1) @ v[0, 0])
    ones = torch.ones_like(q[..., :1])
    torch.testing.assert_close(
        toeplitz_attention_reference(ones, ones, v, c), nprf_rpe.dense(q * 0, k, v, c), msg="one feature is no content"
    )


def test_errors_grow_with_the_norm_and_fall_with_features(short: None) -> None:
    assert nprf_rpe.error(4.0, 64, 0) > 2 * nprf_rpe.error(1.0, 64, 0)
    assert nprf_rpe.error(1.0, 1024, 0) < 0.5 * nprf_rpe.error(1.0, 16, 0)


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        ("measure_error", {"seeds": 1}),
        ("measure_time", {"repeats": 1}),
        ("measure_conversion", {"seeds": 1, "steps": 2}),
    ],
)
def test_results_have_a_verdict_and_their_provenance(
    short: None, measure: str, options: dict[str, int], tmp_path: Path
) -> None:
    result = getattr(nprf_rpe, measure)(**options, seed=7, out=tmp_path)
    claims = {c.measured_by: c for c in load_card("nprf_rpe").claims}
    claim = claims[f"foveal.papers.measures.nprf_rpe:{measure}"]
    assert json.loads((tmp_path / "nprf_rpe" / f"{claim.id}.json").read_text(encoding="utf-8")) == result
    assert result["claim"] == claim.id and result["seed"] == 7 and result["verdict"]
