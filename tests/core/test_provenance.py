"""Provenance: complete, without private facts, and right about the commit."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from foveal import __version__
from foveal.core import provenance as module
from foveal.core.machine import compiler, cpu_model, machine, memory_gb, simd_flags, usable_cores
from foveal.core.provenance import command_line, git_state, provenance


def test_it_is_complete_and_plain_json() -> None:
    facts = provenance()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["foveal"] == __version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"cpu", "cores", "memory_gb", "architecture", "os"} <= set(facts["machine"])
    assert facts["machine"]["cores"] >= 1
    assert set(module.PACKAGES) <= set(facts)
    when = datetime.fromisoformat(facts["date"])
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=5)


def test_versions_and_threads_are_those_in_use() -> None:
    import torch

    facts = provenance()
    assert facts["torch"] == torch.__version__
    assert facts["machine"]["threads"] == torch.get_num_threads()


def test_absent_packages_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("no_such_package",))
    assert provenance()["no_such_package"] is None


def test_no_absolute_paths_and_no_user_name() -> None:
    text = json.dumps(provenance())
    assert str(Path.home()) not in text
    assert str(Path(__file__).resolve().parents[2]) not in text


def test_command_line_keeps_options_and_cuts_paths() -> None:
    argv = ["/usr/bin/foveal", "tune", "/models/mine", "--out=/tmp/x/out", "--text", "~/a.txt", "org/model", "out/tune"]
    assert command_line(argv) == "foveal tune mine --out=out --text a.txt org/model out/tune"
    assert command_line([]) == "python"


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    (tmp_path / "foveal").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "foveal" / "a.py").write_text("1")
    (tmp_path / "README.md").write_text("1")
    git(tmp_path, "init")
    assert git_state(tmp_path) is None  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    assert git_state(tmp_path / "foveal") is None  # somebody else's checkout around an installed package
    (tmp_path / "README.md").write_text("2")
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "foveal" / "b.py").write_text("new")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
    (tmp_path / "foveal" / "b.py").unlink()
    (tmp_path / "foveal" / "a.py").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}


def test_no_git_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None
    assert compiler() is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_machine_facts_agree_with_proc() -> None:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    assert cpu_model() and cpu_model() in cpuinfo
    assert 1 <= usable_cores() <= cpuinfo.count("processor\t:")
    total = int(next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemTotal")).split()[1])
    assert memory_gb() is not None and memory_gb() <= total * 1024 / 1e9 * 1.05
    for flag, name in (("avx2", "AVX2"), ("fma", "FMA"), ("asimd", "NEON")):
        assert (name in simd_flags()) == (f" {flag} " in cpuinfo)
    assert machine()["memory_gb"] == memory_gb()
