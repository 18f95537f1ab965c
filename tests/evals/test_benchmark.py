"""The benchmark script runs from end to end on a tiny model and writes what it promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the package transformers")
pytest.importorskip("jinja2", reason="needs the package jinja2")
pytest.importorskip("matplotlib", reason="needs the package matplotlib")

from foveal.data.text import load_text
from tests.tune.tiny import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]


def test_eval_smollm2(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(load_text()[:20_000])
    command = [sys.executable, str(ROOT / "benchmarks" / "eval_smollm2.py"), "--model", str(model), "--context", "200"]
    command += [
        "--tasks",
        "perplexity,kl,copy",
        "--text",
        str(text),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "r.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [arm["name"] for arm in data["arms"]] == ["dense", "block top-k 25 %"]
    assert list(data["tasks"]) == ["perplexity", "kl", "copy"] and data["provenance"]["torch"]
    assert data["tasks"]["perplexity"]["arms"]["block top-k 25 %"]["density"] < 1
    assert (tmp_path / "work" / "report.html").is_file()
