"""``foveal info``: true on this machine, and alive when packages are broken or absent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from rich.console import Console

from foveal.core.cache import cache_dir, folder_size
from foveal.core.info import PACKAGES, info, probe, render

ROOT = Path(__file__).resolve().parents[2]


def printed(facts: dict[str, object]) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(render(facts))
    return capture.get()


def test_it_is_true_here() -> None:
    import torch

    from foveal.kernels import IMPLEMENTATIONS

    facts = info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["packages"]["torch"] == {"version": torch.__version__, "problem": None, "extra": "needed"}
    assert list(facts["implementations"]) == list(IMPLEMENTATIONS)
    assert facts["implementations"]["reference"]["problem"] is None
    assert facts["implementations"]["gather"]["problem"] is None
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert bool(facts["gpus"]) == (facts["gpu_problem"] is None)
    assert facts["cache"]["path"] == str(cache_dir())
    text = printed(facts)
    for name in (*IMPLEMENTATIONS, *PACKAGES, "smollm2", "C++ compiler"):
        assert name in text


def test_packages_are_those_of_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {line.split(">")[0] for line in project["dependencies"]} - {"typer", "rich"}  # this text needs those two
    extras = {
        extra: {line.split(">")[0] for line in project["optional-dependencies"][extra]} for extra in ("hf", "report")
    }
    assert {n for n, e in PACKAGES.items() if e == "needed"} == names
    for extra, wanted in extras.items():
        assert {n for n, e in PACKAGES.items() if e == extra} == wanted


def test_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fine_pkg.py").write_text("__version__ = '1.5'")
    (tmp_path / "nameless_pkg.py").write_text("")
    (tmp_path / "broken_pkg.py").write_text("raise OSError('libfoo.so: no such file\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    assert probe("fine_pkg") == {"version": "1.5", "problem": None}
    assert probe("nameless_pkg") == {"version": "unknown", "problem": None}
    assert probe("broken_pkg")["problem"] == "cannot be imported: OSError: libfoo.so: no such file"
    assert probe("absent_pkg") == {"version": None, "problem": "not installed"}


@pytest.mark.parametrize("broken", [("torch",), ("transformers",), ("numpy", "matplotlib"), tuple(PACKAGES)])
def test_the_command_survives_broken_packages(tmp_path: Path, broken: tuple[str, ...]) -> None:
    for name in broken:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} was built for another machine\\nsecond line')")
    run = subprocess.run(
        [sys.executable, "-c", "from foveal.cli import main; main()", "info", "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    for name in broken:
        assert facts["packages"][name]["problem"] == (
            f"cannot be imported: ImportError: {name} was built for another machine"
        )
    if "torch" in broken:
        assert "torch was built for another machine" in facts["implementations"]["all"]["problem"]
        assert "torch was built for another machine" in facts["gpu_problem"]
    text = printed(facts)
    assert f"{broken[0]} was built for another machine" in text and "second line" not in text


def test_absent_packages_name_their_extra() -> None:
    facts = info()
    facts["packages"]["gguf"] = {"version": None, "problem": "not installed", "extra": "hf"}
    assert "not installed: pip install 'foveal[hf]'" in printed(facts)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("FOVEAL_CACHE", raising=False)
    assert cache_dir() == tmp_path / "home" / ".cache" / "foveal"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "foveal"
    monkeypatch.setenv("FOVEAL_CACHE", "~/mine")
    assert cache_dir() == tmp_path / "home" / "mine"


def test_folder_size(tmp_path: Path) -> None:
    assert folder_size(tmp_path / "nowhere") == 0
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "a" / "b" / "y").write_bytes(b"4567")
    assert folder_size(tmp_path) == 7
