"""``foveal bench`` on CUDA: whatever is installed computes the mask that it accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from foveal.bench.masks import parse_masks
from foveal.bench.sweep import Sweep, run_sweep
from foveal.bench.workload import BACKWARD, FORWARD, Heads

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU on this machine"),
]


def test_no_implementation_is_wrong(tmp_path: Path) -> None:
    masks = tuple(parse_masks("all", {"window": 100, "block": 128}))
    sweep = Sweep(
        masks, (1024,), (Heads(8, 2, 64), Heads(4, 4, 64)), ("bfloat16",), (FORWARD, BACKWARD), ("auto",), "cuda", repeats=2, warmup=1
    )  # fmt: skip
    records, absent = run_sweep(sweep, tmp_path)
    by_impl: dict[str, set[str]] = {}
    for row in records.rows:
        by_impl.setdefault(row["impl"], set()).add(row["status"])
        assert row["status"] != "wrong", f"{row['impl']}, {row['mask']}, {row['direction']}: {row['why']}"
    assert all("ok" in statuses for statuses in by_impl.values()), f"{by_impl}, absent {absent}"
    ran = {(row["impl"], row["mask"], row["direction"]) for row in records.rows if row["status"] == "ok"}
    assert all(("flex", str(mask), way) in ran for mask in masks for way in (FORWARD, BACKWARD))
