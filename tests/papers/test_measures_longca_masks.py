"""LongCA-bench's claims about masks: bytes are exact at any size, and verdicts follow from the figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.bench.implementations import implementations
from foveal.bench.masks import parse_mask, parse_masks
from foveal.bench.summary import groups
from foveal.bench.workload import BACKWARD, Heads, Work
from foveal.core.errors import UnsupportedError
from foveal.papers.measures import longca_masks as measures
from tests.bench.lines import line


def test_bytes_of_masks_and_saved_tensors_grow_as_claimed(tmp_path: Path) -> None:
    result = measures.measure_memory(out=tmp_path, lengths=(768, 1536))
    assert result["verdict"] == "reproduced"
    assert result["measured"]["slopes"]["naive"] > 1.9 and result["measured"]["slopes"]["gather"] == pytest.approx(
        1, abs=0.05
    )
    stored = json.loads((tmp_path / "longca_bench" / "dense-mask-memory.json").read_text())
    assert stored == result


def test_kept_bytes_are_what_the_backward_pass_needs() -> None:
    """Without a mask SDPA keeps its output and one number for each row."""
    work = Work.make(parse_mask("causal").draw(200), Heads(2, 2, 16), torch.float32, BACKWARD)
    found = measures.kept_bytes(implementations()["sdpa"].prepare(work), work)
    assert found == 4 * (2 * 200 * 16 + 2 * 200)


def test_times_over_areas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def times(**each: float) -> Any:
        def fixed(jobs: dict[str, Any], repeats: int) -> dict[str, list[float]]:
            for job in jobs.values():
                job()
            return {
                name: [each[name.split()[1].split("-")[0]] if "sliding" in name else 1.0] * repeats for name in jobs
            }

        return fixed

    def verdict(**each: float) -> Any:
        monkeypatch.setattr(measures, "interleaved", times(**each))
        return measures.measure_area(out=tmp_path, length=256, window=32, repeats=2)

    found = verdict(native=0.3, gather=0.4, dense=1.0)
    assert found["verdict"] == "reproduced" and found["measured"]["area_ratio"] == pytest.approx(7920 / 32896, abs=1e-4)
    assert verdict(native=0.3, gather=0.5, dense=1.0)["verdict"] == "direction holds"
    assert verdict(native=0.3, gather=0.4, dense=0.5)["verdict"] == "direction holds"
    assert verdict(native=0.3, gather=1.1, dense=1.0)["verdict"] == "not reproduced"


def rates(flex: float, dense: float, refused: str = "") -> list[Any]:
    rows = []
    for spec in parse_masks("static"):
        plain = spec.name in ("full", "causal")
        rows.append(line(str(spec), 16384, "flex", None if spec.name == refused else 100.0 if plain else flex))
        note = {} if plain else {"note": "with a dense mask"}
        rows.append(line(str(spec), 16384, "sdpa", 200.0 if plain else dense, **note))
    return groups(rows)


def test_specialisation(tmp_path: Path) -> None:
    def verdict(*each: Any) -> str:
        return measures.judge_specialisation(rates(*each), tmp_path)["verdict"]

    assert verdict(60.0, 20.0) == "reproduced"
    assert verdict(40.0, 20.0) == "direction holds", "FlexAttention misses the factor of two"
    assert verdict(60.0, 150.0) == "not reproduced", "the dense mask follows the area too"
    assert verdict(60.0, 20.0, "global_sliding") == "direction holds", "a mask did not run"


def test_block_size(tmp_path: Path) -> None:
    def verdict(small: float | None, large: float) -> dict[str, Any]:
        names = ("uniform_block_sparse:block=64", "uniform_block_sparse")
        return measures.judge_block_size(
            groups([line(n, 64, "flex", r) for n, r in zip(names, (small, large), strict=True)]), tmp_path
        )

    assert verdict(50.0, 80.0)["verdict"] == "reproduced" and "= 1.60" in verdict(50.0, 80.0)["measured"]["ours"]
    assert verdict(50.0, 60.0)["verdict"] == "direction holds"
    assert verdict(80.0, 60.0)["verdict"] == "not reproduced"
    with pytest.raises(UnsupportedError, match="did not run: has no backward"):
        verdict(None, 60.0)
    with pytest.raises(UnsupportedError, match="did not run"):
        measures.judge_specialisation(rates(60.0, 20.0, "full"), tmp_path)


def test_the_gpu_measures_ask_for_the_right_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(measures, "_rows", lambda sweep: (asked.append(sweep), rates(60.0, 20.0))[1])
    measures.measure_specialisation(out=tmp_path, device="cpu")
    assert len(list(asked[0].cases())) == 12 and asked[0].dtypes == ("bfloat16",) and asked[0].lengths == (16384,)
    made = groups(
        [line("uniform_block_sparse:block=64", 64, "flex", 1.0), line("uniform_block_sparse", 64, "flex", 2.0)]
    )
    monkeypatch.setattr(measures, "_rows", lambda sweep: (asked.append(sweep), made)[1])
    measures.measure_block_size(out=tmp_path, device="cpu")
    assert [str(case.spec) for case in asked[1].cases()] == ["uniform_block_sparse:block=64", "uniform_block_sparse"]
