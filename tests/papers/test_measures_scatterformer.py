"""ScatterFormer's claims: what is measured is what is said, and the result files are what the card reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveal.kernels.linear_ragged import linear_attention_packed
from foveal.papers.cards import load_card
from foveal.papers.measures import scatterformer


def test_the_other_forms_compute_the_same() -> None:
    g = torch.Generator().manual_seed(0)
    sizes = torch.tensor([3, 1, 5])
    q, k, v = (torch.rand(9, 2, 4, generator=g, dtype=torch.float64) for _ in range(3))
    exact, _ = linear_attention_packed(q, k, v, torch.tensor([0, 3, 4, 9]), eps=1e-6, impl="reference")
    torch.testing.assert_close(scatterformer.padded(q, k, v, torch.arange(5) < sizes[:, None]), exact)
    window = torch.repeat_interleave(torch.arange(3), sizes)
    torch.testing.assert_close(scatterformer.naive(q, k, v, window, 3), exact)


def test_labels_are_the_majorities_that_are_promised() -> None:
    coords, x, labels = scatterformer.scenes(2, torch.Generator().manual_seed(0))
    size = scatterformer.WINDOW
    for i in range(0, len(coords), 7):
        b, z, yy, xx = coords[i].tolist()
        window = across = 0.0
        for (b2, z2, y2, x2), value in zip(coords.tolist(), x.tolist(), strict=True):
            same = (b2, y2 // size, x2 // size) == (b, yy // size, xx // size)
            near = z2 == z and ((y2 == yy and abs(x2 - xx) <= size // 2) or (x2 == xx and abs(y2 - yy) <= size // 2))
            window += value[0] if same else 0.0
            across += value[1] if b2 == b and near and not same else 0.0
        assert labels[i].tolist() == [float(window > 0), float(across > 0)]
    assert 0.2 < float(labels.mean()) < 0.6


@pytest.mark.parametrize(
    ("measure", "options"), [("measure_padding", {"repeats": 1}), ("measure_parts", {"seeds": 1, "steps": 2})]
)
def test_results_have_a_verdict_and_their_provenance(
    measure: str, options: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatterformer, "SETS", 40)
    monkeypatch.setattr(scatterformer, "SCENES", 1)
    result = getattr(scatterformer, measure)(**options, seed=7, out=tmp_path)
    claims = {c.measured_by: c for c in load_card("scatterformer").claims}
    claim = claims[f"foveal.papers.measures.scatterformer:{measure}"]
    assert json.loads((tmp_path / "scatterformer" / f"{claim.id}.json").read_text(encoding="utf-8")) == result
    assert result["claim"] == claim.id and result["seed"] == 7
