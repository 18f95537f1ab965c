"""foveal installs on a machine without a working C++ compiler, and then works without its C++ part."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in type(f).__module__]  # this checkout's own installation
sys.path.insert(0, sys.argv[1])
import torch, foveal
from foveal.core.info import info
assert foveal.__file__.startswith(sys.argv[1]), foveal.__file__
q = torch.randn(1, 2, 300, 16)
out = foveal.attention(q, q, q, foveal.patterns.SlidingWindow(20), causal=True)
want = foveal.attention(q.double(), q.double(), q.double(), foveal.patterns.SlidingWindow(20), causal=True, impl="reference")
assert torch.allclose(out.double(), want, atol=1e-5)
print(foveal.explain(q, q, q, foveal.patterns.SlidingWindow(20), causal=True).impl, info()["implementations"]["native"]["problem"])
"""


def test_installs_and_works_without_a_compiler(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "foveal", "src"):
        whole = ROOT / name
        if whole.is_dir():
            shutil.copytree(whole, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(whole, source)
    command = [
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(target),
        str(source),
    ]
    without = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run([sys.executable, *command], env=without, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(target.rglob("_native*.so"))
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", CODE, str(target)],
        env=outside,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("gather needs its C++ part"), ran.stdout
