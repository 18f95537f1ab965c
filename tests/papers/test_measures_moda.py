"""MODA's cost claim: the verdict follows from the ratios."""

from __future__ import annotations

import json

import pytest

from foveal.papers.cards import load_card
from foveal.papers.measures import moda


@pytest.mark.parametrize(
    ("attention", "verdict"), [(2.0, "reproduced"), (1.5, "direction holds"), (0.8, "not reproduced")]
)
def test_the_verdict_follows_from_how_the_ratio_falls(monkeypatch, tmp_path, attention, verdict):
    def clock(jobs, repeats):
        assert set(jobs) == {f"{part} {n}" for part in ("aligner", "attention") for n in moda.LENGTHS}
        return {name: [float(name.split()[1]) ** (1.0 if "aligner" in name else attention)] * repeats for name in jobs}

    monkeypatch.setattr(moda, "interleaved", clock)
    assert moda.measure_overhead(out=tmp_path)["verdict"] == verdict


def test_the_result_has_its_provenance(monkeypatch, tmp_path):
    monkeypatch.setattr(moda, "LENGTHS", (16, 32, 64))
    result = moda.measure_overhead(repeats=1, out=tmp_path)
    claim = next(c for c in load_card("moda").claims if c.id == "linear-overhead")
    assert claim.measured_by == "foveal.papers.measures.moda:measure_overhead"
    assert json.loads((tmp_path / "moda" / "linear-overhead.json").read_text()) == result
