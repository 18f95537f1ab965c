"""``foveal reproduce``: the measures that cards name, outcomes, and what cannot be measured here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foveal.cli import app
from foveal.core.errors import ConfigError, ModelError
from foveal.papers import cards, load_card
from foveal.papers.cards import VERDICTS, Claim
from foveal.papers.measures import fna, gna
from foveal.papers.reproduce import claims_of, measure_of, obstacle, reproduce, stored

runner = CliRunner()
NAMED = [claim for card in cards().values() for claim in card.claims if claim.measured_by]


@pytest.mark.parametrize("claim", NAMED, ids=lambda c: f"{c.slug}/{c.id}")
def test_every_named_measure_exists_and_takes_a_folder(claim: Claim) -> None:
    import inspect

    assert "out" in inspect.signature(measure_of(claim)).parameters


def test_simulated_claims_are_reproduced(tmp_path: Path) -> None:
    found = {
        claim_id: next(reproduce("gna", claim_id, out=tmp_path))
        for claim_id in ("hunyuan-end-to-end", "hunyuan-operator-bounds", "flux-4k-end-to-end", "cosmos-end-to-end", "dense-first-steps")
    }  # fmt: skip
    for claim_id, outcome in found.items():
        assert outcome.verdict == "reproduced", claim_id
        file = tmp_path / "gna" / f"{claim_id}.json"
        assert json.loads(file.read_text()) == outcome.result
    assert found["hunyuan-end-to-end"].ours == "1×1×1: 1.73×, 1×8×8: 2.17×, 16×8×8: 2.23× simulated"


def test_a_verdict_follows_from_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gna, "TOLERANCE", 1e-4)
    assert gna.measure_cosmos(out=tmp_path)["verdict"] == "direction holds"
    monkeypatch.setitem(gna.BOUNDS, (16, 8, 8), 12.0)
    assert gna.measure_bounds(out=tmp_path)["verdict"] == "direction holds"


def test_the_timed_claim_on_a_small_grid(tmp_path: Path) -> None:
    result = gna.measure_block_sparse(out=tmp_path, repeats=1, side=16)
    assert result["measured"]["error"] < 1e-5 and result["measured"]["flop_ratio"] == 16
    assert result["verdict"] in [str(v) for v in VERDICTS]


SMALL = {"1-D": ((64,), (8,)), "2-D": ((8, 8), (4, 4)), "3-D": ((4, 4, 4), (2, 2, 2))}


@pytest.mark.parametrize("measure", [fna.measure_gemm, fna.measure_fused])
def test_the_forms_are_compared_on_the_same_inputs(measure: Any, tmp_path: Path) -> None:
    result = measure(out=tmp_path, repeats=1, shapes=SMALL)
    assert all(row["difference"] < 1e-5 and row["naive"] == 1 for row in result["measured"]["rows"].values())
    assert result["verdict"] in [str(v) for v in VERDICTS]


def test_peak_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    """With four times the window, the form that stores its weights grows by at least those, the fused one by less than half of that.

    Growth is compared and not the ratio of the peaks: what every process needs beside the weights differs between machines.
    """
    side = 32  # small enough not to be cut into batches
    peak = fna.measure_memory(out=tmp_path, side=side)["measured"]["peak_mb"]
    weights = 4 * fna.HEADS * side**2 * (16**2 - 8**2) / 2**20
    stored, fused = (peak[f"{form} 16×16"] - peak[f"{form} 8×8"] for form in ("gemm", "fused"))
    assert stored > weights and stored > 2 * fused and peak["gemm 8×8"] > peak["fused 8×8"] > 0


def test_what_cannot_be_measured_says_why(tmp_path: Path) -> None:
    claims = {claim.id: claim for claim in load_card("gna").claims}
    assert obstacle(claims["vbench-quality"]).startswith("needs HunyuanVideo weights")
    if not torch.cuda.is_available():
        assert "CUDA GPU" in obstacle(claims["block-sparse-reaches-bound-gpu"])
    outcome = next(reproduce("gna", "kernel-flops", out=tmp_path))
    assert outcome.result is None and outcome.why_not and not list(tmp_path.iterdir())
    unwritten = next(c for card in cards().values() for c in card.claims if not c.measured_by and c.scale == "CPU")
    assert obstacle(unwritten) == "no measurement is written yet"


def test_a_missing_model_stops_its_own_claim_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(**_: Any) -> dict[str, Any]:
        raise ModelError("no model here")

    def there(*, out: Path | None) -> dict[str, Any]:
        return {"verdict": "reproduced", "measured": {"ours": "all"}}

    monkeypatch.setattr(fna, "measure_gemm", missing)
    for name in ("measure_fused", "measure_memory", "measure_fused_gpu", "measure_backward_gpu", "measure_dense_gpu"):
        monkeypatch.setattr(fna, name, there)
    monkeypatch.setattr("foveal.papers.measures.fna_models.measure_throughput", there)
    found = {outcome.claim.id: outcome for outcome in reproduce("fna", out=tmp_path)}
    assert found["gemm-forward-fp16"].why_not == "no model here" and found["gemm-forward-fp16"].result is None
    assert found["fused-fp32-forward"].verdict == found["linear-memory"].verdict == "reproduced"
    shown = runner.invoke(app, ["reproduce", "fna", "--out", str(tmp_path)])
    assert shown.exit_code == 0 and "not measured: no model here" in shown.stdout
    with pytest.raises(ModelError, match="no model here"):
        next(reproduce("fna", "gemm-forward-fp16", out=tmp_path))
    alone = runner.invoke(app, ["reproduce", "fna", "--claim", "gemm-forward-fp16", "--out", str(tmp_path)])
    assert alone.exit_code == 2 and "no model here" in alone.stderr


def test_stored_results_are_read_without_measuring() -> None:
    for claim in load_card("dhsa").claims:
        outcome = stored(claim)
        assert (outcome.result is not None) == claim.state.measured
        assert bool(outcome.ours) == claim.state.measured


def test_wrong_names_are_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'gna'"):
        claims_of("gnaa")
    with pytest.raises(ConfigError, match="gna has no claim 'flux'"):
        claims_of("gna", "flux")
    broken = Claim("gna", "x", "s", "f", "s", "foveal.papers.measures.gna:nothing", "CPU", "h")
    with pytest.raises(ConfigError, match=r"names 'foveal\.papers\.measures\.gna:nothing'"):
        measure_of(broken)


def test_the_command(tmp_path: Path) -> None:
    words = ["reproduce", "gna", "--claim", "hunyuan-operator-bounds", "--out", str(tmp_path)]
    result = runner.invoke(app, words, env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    for part in ("paper:", "3.3× (1×1×1)", "ours:", "1×1×1: 3.27×", "criterion:", "verdict:", "reproduced"):
        assert part in result.stdout
    assert (tmp_path / "gna" / "hunyuan-operator-bounds.json").is_file()
    shown = runner.invoke(app, ["reproduce", "gna", "--claim", "vbench-quality", "--out", str(tmp_path)]).stdout
    assert "not measured: needs HunyuanVideo weights" in shown
    assert "verdict:" in runner.invoke(app, ["reproduce", "dhsa", "--stored"]).stdout
    wrong = runner.invoke(app, ["reproduce", "gna", "--claim", "nothing"])
    assert wrong.exit_code == 2 and "has no claim 'nothing'" in wrong.stderr
