"""Machine peaks: every rate is there, positive and at least its median."""

from __future__ import annotations

from foveal.bench.peaks import machine_peaks


def test_rates_are_positive_and_best_is_at_least_the_median() -> None:
    peaks = machine_peaks(size=64, repeats=3)
    names = {"fp32_matmul_gflops", "bf16_matmul_gflops", "fp32_batched_gflops", "copy_gb_s"}
    assert names == peaks["median"].keys() and names <= peaks.keys()
    assert all(peaks[name] >= peaks["median"][name] > 0 for name in names)
