"""SLAB's claims: what is measured is what is said, and the result files are what the card reads."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from foveal.models import ViT
from foveal.papers.cards import load_card
from foveal.papers.measures import slab

NEEDS_DIGITS = pytest.mark.skipif(find_spec("sklearn") is None, reason="needs scikit-learn")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("SIDE", 32),
        ("SPEED_DIM", 24),
        ("SPEED_DEPTH", 2),
        ("SIDES", (4, 6)),
        ("DEPTH", 1),
        ("DIM", 16),
        ("FOLD_DIM", 16),
        ("TRAINED_SEEDS", 1),
    ):
        monkeypatch.setattr(slab, name, value)


def test_layer_norms_take_the_places_of_all_others() -> None:
    model = slab.with_layer_norm(ViT(3, depth=2))
    kinds = [type(m) for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.RMSNorm))]
    assert kinds == [nn.LayerNorm] * 5


def test_a_diverged_training_is_told(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setattr(slab.nn.functional, "cross_entropy", lambda x, y: x.sum() * torch.nan)
    assert slab.train_digits("prepbn", 0, 2) is None


@pytest.mark.parametrize(
    ("measure", "options"),
    [
        pytest.param("measure_fold", {"seeds": 1, "steps": 4}, marks=NEEDS_DIGITS),
        ("measure_speed", {"repeats": 1}),
        ("measure_crossover", {"repeats": 1}),
        pytest.param("measure_training", {"seeds": 1, "steps": 3}, marks=NEEDS_DIGITS),
    ],
)
def test_results_have_a_verdict_and_their_provenance(
    short: None, measure: str, options: dict[str, int], tmp_path: Path
) -> None:
    result = getattr(slab, measure)(**options, seed=7, out=tmp_path)
    claims = {c.measured_by: c for c in load_card("slab").claims}
    claim = claims[f"foveal.papers.measures.slab:{measure}"]
    assert json.loads((tmp_path / "slab" / f"{claim.id}.json").read_text(encoding="utf-8")) == result
    assert result["claim"] == claim.id and result["seed"] == 7
    if measure == "measure_fold":
        assert result["verdict"] == "reproduced"
