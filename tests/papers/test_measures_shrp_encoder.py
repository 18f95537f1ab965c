"""SHRP's claim on a real encoder: the result follows from the run, here of a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the package transformers")

from foveal.data.text import load_text
from foveal.papers.measures import shrp_encoder
from tests.compress.tiny import save_tiny_encoder


@pytest.mark.parametrize(("least", "verdict"), [(0.0, "direction holds"), (99.0, "not reproduced")])
def test_the_result_says_what_the_run_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: float, verdict: str
) -> None:
    monkeypatch.setattr(shrp_encoder, "LEAST_KEPT", least)
    text = tmp_path / "prose.txt"
    text.write_text(load_text()[:120_000])
    few = {
        "steps": 2,
        "post_steps": 1,
        "batch": 4,
        "tokens": 16,
        "sentences": 60,
        "pairs": 30,
        "expander": 8,
        "repeats": 1,
    }
    folder = save_tiny_encoder(tmp_path / "model")
    got = shrp_encoder.measure_real_encoder(
        out=tmp_path, work=tmp_path / "work", model=str(folder), text=str(text), **few
    )
    assert json.loads((tmp_path / "shrp" / "real-encoder.json").read_text()) == got and got["verdict"] == verdict
    run = json.loads((tmp_path / "work" / "results.json").read_text())
    assert got["measured"]["quality"] == run["quality"] and got["measured"]["criterion"] == {"mrr_kept_at_least": least}
    assert f"{100 * run['quality']['tuned']['mrr_kept']:.0f} % of the mean reciprocal rank" in got["measured"]["ours"]
