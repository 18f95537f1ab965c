"""The sweep: what a line holds, how it goes on after an interruption, and that a wrong result is never credited."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.bench import implementations, sweep
from foveal.bench.implementations import Implementation, Prepared
from foveal.bench.masks import parse_masks
from foveal.bench.records import FILE, read
from foveal.bench.sweep import Sweep, run_sweep
from foveal.bench.workload import BACKWARD, FORWARD, Heads, Work
from foveal.core.errors import ConfigError, DataError


def small(**changes: Any) -> Sweep:
    options: dict[str, Any] = {
        "masks": tuple(parse_masks("causal,causal_sliding:window=20")), "lengths": (96,), "heads": (Heads(2, 1, 8),), "impls": ("gather", "sdpa"),
        "repeats": 2,
    }  # fmt: skip
    return Sweep(**{**options, **changes})


class Fake(Implementation):
    """SDPA with a fault."""

    def __init__(self, name: str, fault: str = "") -> None:
        self.name, self.what, self.fault, self.calls = name, "", fault, 0

    def prepare(self, work: Work) -> Prepared:
        right = implementations.implementations()["sdpa"].prepare(work)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.calls += 1
            if self.fault == "oom":
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
            if self.fault == "breaks":
                raise RuntimeError("no kernel\nfor this shape")
            if self.fault == "interrupted" and self.calls > 1:
                raise KeyboardInterrupt
            out = right.run(q, k, v)
            if self.fault == "gradient" and out.requires_grad:
                return out.detach() + 0.9 * (out - out.detach())
            return out * math.nan if self.fault == "nan" else 1.01 * out if self.fault == "value" else out

        return Prepared(run)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Implementation]:
    known = implementations.implementations()
    known.update({name: Fake(name, name) for name in ("oom", "breaks", "nan", "value", "gradient", "interrupted")})
    monkeypatch.setattr(implementations, "implementations", lambda: known)
    return known


def test_lines_hold_what_they_promise(tmp_path: Path) -> None:
    records, absent = run_sweep(small(directions=(FORWARD, BACKWARD)), tmp_path)
    assert absent == {} and len(records.rows) == 2 * 2 * 2
    header, rows = read(tmp_path)
    assert rows == records.rows and header["provenance"]["torch"] == torch.__version__
    assert header["settings"]["repeats"] == 2 and header["settings"]["machine"]["threads"] == torch.get_num_threads()
    for row in rows:
        assert row["status"] == "ok" and row["error"] < 1e-6 and row["seconds"]["count"] == 2
        area = 2 * (96 * 97 // 2 if row["mask"] == "causal" else 21 * 96 - 20 * 21 // 2)
        assert row["area"] == area and row["flops"] == area * 8 * (4 if row["direction"] == FORWARD else 10)
        assert row["tflops"] == pytest.approx(row["flops"] / row["seconds"]["median"] / 1e12, rel=1e-4)
        assert row["density"] == pytest.approx(area / (2 * 96**2), rel=1e-4)
        assert ("grad_error" in row) == (row["direction"] == BACKWARD) and row["beside"] == ["gather", "sdpa"]
        assert row["peak_mb"] >= 0 and row["metadata_mb"] >= 0 and row["prepare_s"] >= 0


def test_a_sweep_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    whole = sweep.measure_case
    monkeypatch.setattr(sweep, "measure_case", lambda case, todo, own: (done.append(f"{case.spec} {[t.name for t in todo]}"), whole(case, todo, own))[1])  # fmt: skip
    run_sweep(small(masks=tuple(parse_masks("causal")), impls=("gather",)), tmp_path)
    before = (tmp_path / FILE).read_text()
    with (tmp_path / FILE).open("a") as file:
        file.write('{"mask": "causal_sliding:wi')  # cut off while it was written
    said: list[tuple[str, int, int]] = []
    records, _ = run_sweep(small(), tmp_path, lambda *step: said.append(step))
    assert done == ["causal ['gather']", "causal ['sdpa']", "causal_sliding:window=20 ['gather', 'sdpa']"]
    assert (tmp_path / FILE).read_text().startswith(before) and len(records.rows) == 4
    assert said[0][1:] == (0, 2) and said[-1] == ("done", 2, 2)
    run_sweep(small(), tmp_path)
    assert len(done) == 3 and len(read(tmp_path)[1]) == 4, "nothing is measured twice"


def test_an_interruption_keeps_finished_cases(tmp_path: Path, fakes: dict[str, Implementation]) -> None:
    options = small(impls=("sdpa", "interrupted"))
    fakes["interrupted"].calls = -4  # type: ignore[attr-defined]  # the first case takes four calls and one more
    with pytest.raises(KeyboardInterrupt):
        run_sweep(options, tmp_path)
    assert [row["mask"] for row in read(tmp_path)[1]] == ["causal", "causal"]


def test_nothing_is_written_before_a_case_is_finished(tmp_path: Path, fakes: dict[str, Implementation]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_sweep(small(impls=("interrupted",)), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ConfigError, match="Did you mean 'gather'"):
        run_sweep(small(impls=("gahter",)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_wrong_results_get_no_rate(tmp_path: Path, fakes: dict[str, Implementation]) -> None:
    names = ("sdpa", "value", "nan", "gradient", "oom", "breaks")
    rows = run_sweep(small(masks=tuple(parse_masks("causal")), impls=names, directions=(FORWARD, BACKWARD)), tmp_path)[
        0
    ].rows
    status = {(row["impl"], row["direction"]): row["status"] for row in rows}
    for direction in (FORWARD, BACKWARD):
        assert status["sdpa", direction] == "ok" and status["oom", direction] == "oom"
        assert (
            status["value", direction] == status["nan", direction] == "wrong"
            and status["breaks", direction] == "unsupported"
        )
    assert status["gradient", FORWARD] == "ok" and status["gradient", BACKWARD] == "wrong"
    for row in rows:
        assert ("tflops" in row) == (row["status"] == "ok") == ("why" not in row)
    why = {row["impl"]: row.get("why", "") for row in rows}
    assert "differs from float64 by 0.01" in why["value"] and why["breaks"] == "RuntimeError: no kernel for this shape"
    assert next(row["error"] for row in rows if row["impl"] == "nan") is None
    assert [row["beside"] for row in rows if row["impl"] == "sdpa"] == [["gradient", "sdpa"], ["sdpa"]]


def test_too_little_memory_for_all_together_ends_the_case_and_not_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, calls = sweep.interleaved, []

    def first_fails(*words: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise MemoryError
        return usual(*words, **options)

    monkeypatch.setattr(sweep, "interleaved", first_fails)
    rows = run_sweep(small(), tmp_path)[0].rows
    assert [row["status"] for row in rows] == ["oom", "oom", "ok", "ok"] and rows[0]["why"] == "out of memory"


def test_a_length_that_a_mask_does_not_have_is_a_reason(tmp_path: Path) -> None:
    rows = run_sweep(small(masks=tuple(parse_masks("block_causal_document,full"))), tmp_path)[0].rows
    assert [row["status"] for row in rows] == ["unsupported", "unsupported", "ok", "ok"]
    assert "blocks of 1024 tokens and the length is 96" in rows[0]["why"]


def test_draws_are_shared_by_implementations_and_only_where_there_is_chance(tmp_path: Path) -> None:
    rows = run_sweep(small(masks=tuple(parse_masks("causal,full_document")), draws=3, repeats=1), tmp_path)[0].rows
    areas: dict[str, list[tuple[int, int]]] = {}
    for row in rows:
        areas.setdefault(f"{row['mask']} {row['impl']}", []).append((row["draw"], row["area"]))
    assert len(areas["causal sdpa"]) == 1 and len(areas["full_document sdpa"]) == 3
    assert areas["full_document sdpa"] == areas["full_document gather"]


def test_slow_cases_take_fewer_turns(tmp_path: Path) -> None:
    rows = run_sweep(small(repeats=50, seconds=1e-9), tmp_path)[0].rows
    assert {row["seconds"]["count"] for row in rows} == {3}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"foveal_bench": 99}\n', "has schema 99; this foveal reads and writes schema 1"),
        ('{"other": 1}\n', "is no result file of foveal bench"),
        ("hello\n", "is no result file of foveal bench"),
        ("", "is empty"),
        ('{"foveal_bench": 1}\n{"mask": "causal"}\n{"mask": "full"}\n', "is damaged in line 2"),
        ('{"foveal_bench": 1, "settings": {}}\n', "was measured otherwise: device was None and is 'cpu'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_left(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError) as error:
        run_sweep(small(), tmp_path)
    assert message in str(error.value) and (tmp_path / FILE).read_text() == content


def test_another_machine_or_commit_is_another_file(tmp_path: Path) -> None:
    run_sweep(small(masks=tuple(parse_masks("causal")), impls=("sdpa",)), tmp_path)
    with pytest.raises(DataError, match=r"repeats was 2 and is 3.*Choose another --out"):
        run_sweep(small(repeats=3), tmp_path)
    lines = (tmp_path / FILE).read_text().splitlines()
    header = json.loads(lines[0])
    header["settings"]["commit"] = "0" * 40
    (tmp_path / FILE).write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")
    with pytest.raises(DataError, match="commit was '0000"):
        run_sweep(small(), tmp_path)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_sweep(small(masks=tuple(parse_masks("causal"))), tmp_path)
    before = (tmp_path / FILE).read_text()
    usual = Path.open

    def full(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode == "a":
            raise OSError(28, "No space left on device")
        return usual(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(DataError, match="No space left on device"):
        run_sweep(small(), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / FILE).read_text() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": (Heads(4, 3, 8),)}, "4 query heads, 3 key heads of 8; expected"),
        ({"dtypes": ("float64",)}, "dtype is 'float64'; expected one of float32, bfloat16, float16"),
        ({"lengths": (0,)}, "at least 1 token"),
        ({"lengths": ()}, "lengths is empty"),
        ({"repeats": 0}, "repeats is 0"),
        ({"seconds": 0.0}, "seconds is 0.0"),
        ({"device": "gpu0"}, "device is 'gpu0'"),
    ],
)
def test_bad_options(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        small(**changes)
    assert message in str(error.value)
