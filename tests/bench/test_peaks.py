"""Machine peaks: every rate is there, positive and at least its median."""

from __future__ import annotations

import pytest

from foveal.bench import peaks
from foveal.bench.peaks import machine_peaks


def test_rates_are_positive_and_best_is_at_least_the_median() -> None:
    rates = machine_peaks(size=64, repeats=3)
    names = {"fp32_matmul_gflops", "bf16_matmul_gflops", "fp32_batched_gflops", "copy_gb_s"}
    assert names == rates["median"].keys() and names <= rates.keys()
    assert all(rates[name] >= rates["median"][name] > 0 for name in names)


def test_emulated_bfloat16_is_measured_on_small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "slowdown", lambda dtype: 10.0)
    found = machine_peaks(size=300, repeats=1)
    assert found["size"] == 300 and found["bf16_size"] == 256
