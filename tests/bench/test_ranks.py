"""The benchmark over ranks: it runs, notices what is wrong, ends when a rank dies, and writes nothing half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foveal.bench import ranks
from foveal.core.errors import FovealError

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run([sys.executable, "-m", "foveal", *words], capture_output=True, text=True, env=ENV)


@pytest.mark.slow
def test_quick_check_passes_and_writes_its_result(tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    done = command("bench", "--ranks", "2", "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["schema"] == ranks.SCHEMA and result["ranks"] == 2 and result["mismatches"] == []
    assert {"provenance", "prediction", "balance", "exact"} <= set(result)
    assert result["balance"]["contiguous"]["pairs_max_over_mean"] == pytest.approx(1.5, rel=0.01)


@pytest.mark.slow
def test_a_wrong_argument_is_one_error_on_every_rank_and_no_file(tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    done = command("bench", "--ranks", "2", "--quick", "--impl", "gathr", "--out", str(out))
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.count("impl='gathr' is unknown") == 2 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_one_message_each(tmp_path: Path) -> None:
    """Rank 1 kills itself in its second job."""
    out, trap = tmp_path / "ranks.json", tmp_path / "trap"
    trap.mkdir()
    (trap / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import foveal.bench.ranks as r\n"
        "    r.balance = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join([str(trap), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = ["bench", "--ranks", "2", "--quick", "--timeout", "20", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "foveal", *words], capture_output=True, text=True, env={**ENV, "PYTHONPATH": path}
    )
    assert done.returncode == 2 and not out.exists() and "Traceback" not in done.stderr
    assert done.stderr.count("error: rank 0") == 1 and done.stderr.count("error: rank 1 was ended by signal 9") == 1, (
        done.stderr
    )


def test_bad_counts_are_refused() -> None:
    from foveal.bench.rank_launch import launch

    with pytest.raises(FovealError, match="--ranks is 0"):
        launch(0, [], 1.0)


def test_prediction_is_a_labelled_model_that_follows_its_parameters() -> None:
    full = ranks.predict()
    assert "model" in full["label"] and set(full["parameters"]) == {
        "gpus",
        "per_node",
        "flops",
        "inside",
        "across",
        "latency",
    }
    assert "unsupported" in full["rows"]["ulysses"]  # 64 heads do not divide over 96
    slow = ranks.predict(ranks.Cluster(across=1e9))
    for name in ("usp", "ring", "all_gather"):
        assert slow["rows"][name]["causal"]["seconds"] > full["rows"][name]["causal"]["seconds"]
    one = ranks.predict(ranks.Cluster(gpus=1))
    assert one["rows"]["ring"]["full"]["tflops_per_gpu"] == pytest.approx(500)
