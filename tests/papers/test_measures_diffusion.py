"""CLEAR's and Re-ttention's measures: their verdicts, what they count, and result files that a card can read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveal.papers.cards import load_card
from foveal.papers.measures import clear, rettention
from foveal.patterns import Dense, Rettention
from foveal.patterns.disc import disc_pairs


def test_pairs_are_counted_as_the_closed_form_says() -> None:
    for side, radius in ((64, 8), (5, 3), (5, 30)):
        assert clear.counted(side, radius) == disc_pairs((side, side), clear.TEXT, radius)


def test_operations_are_reproduced_and_a_wrong_table_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = clear.measure_flops(out=tmp_path)
    assert result["verdict"] == "reproduced" and result["measured"]["saved_percent_8192_r8"] == 99.538
    assert json.loads((tmp_path / "clear" / "flops-per-layer.json").read_text()) == result
    monkeypatch.setitem(clear.TABLE, 64, ("260.9", "63.5", "80.6", "154.1"))  # the paper's misprint
    assert clear.measure_flops(out=tmp_path)["verdict"] == "direction holds"


def test_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clear, "SIDE", 16)
    monkeypatch.setattr(clear, "TEXT", 32)
    monkeypatch.setattr(clear, "DEVICES", (2,))
    result = clear.measure_strips(out=tmp_path)
    row = result["measured"]["devices"]["2"]
    assert result["verdict"] == "direction holds" and row["exact_largest_error"] <= 1e-5
    assert row["mean_relative_error_of_text"] > 0.01 and row["exchanged_over_all_gather"] == round(2 * 7 * 16 / 256, 4)


def test_drifting_tensors_and_their_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rettention, "LENGTH", 128)
    steps = rettention.drifting(1, 0.02, 1.7)
    assert len(steps) == rettention.STEPS and torch.equal(steps[3][0], rettention.drifting(1, 0.02, 1.7)[3][0])
    exact, ratio = rettention.errors(0, 0.02, 1.7, {"plain": Rettention(Dense(), warmup=0, mode="plain")})
    assert exact["plain"] < 1e-6 and ratio == pytest.approx(1.0, abs=1e-5)
    pictures = {
        "1/32": {name: {"mean": dB} for name, dB in (("plain", 9.0), ("residual", 16.0), ("reshape λ=0.0", 17.0))}
    }
    monkeypatch.setattr(rettention.rettention_digits, "table", lambda seeds: pictures)
    monkeypatch.setattr(rettention, "OTHER", ())
    result = rettention.measure_reshape(seeds=1, out=tmp_path)
    claim = next(c for c in load_card("rettention").claims if c.id == "reshape-beats-residual")
    assert claim.measured_by == "foveal.papers.measures.rettention:measure_reshape"
    assert json.loads((tmp_path / "rettention" / f"{claim.id}.json").read_text()) == result
    measured = result["measured"]
    main = measured["settings"][0]
    assert main["reshape"] < main["residual"] < main["plain"]
    assert measured["criterion_met"]["digits"] and measured["digits_psnr"] == pictures
    assert (result["verdict"] == "reproduced") == measured["criterion_met"]["drifting tensors"]
    pictures["1/32"]["plain"]["mean"] = 12.0  # reshape gains less than 6 dB
    assert rettention.measure_reshape(seeds=1, out=tmp_path)["verdict"] == "direction holds"
    pictures["1/32"]["reshape λ=0.0"]["mean"] = 14.0  # below residual
    assert rettention.measure_reshape(seeds=1, out=tmp_path)["verdict"] == "not reproduced"
