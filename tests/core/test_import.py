"""``import foveal`` is quick: torch and transformers load on first use."""

from __future__ import annotations

import subprocess
import sys

import pytest


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running ``code``."""
    script = f"{code}\nimport sys\nprint(' '.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "code", ["import foveal", "import foveal.papers", "import foveal; foveal.FovealError; foveal.papers"]
)
def test_torch_is_not_imported(code: str) -> None:
    assert not loaded_after(code) & {"torch", "transformers", "numpy", "matplotlib"}


def test_kernels_and_patterns_do_not_import_transformers() -> None:
    loaded = loaded_after("import foveal; foveal.attention; foveal.patterns.names(); foveal.Policy")
    assert "torch" in loaded
    assert not loaded & {"transformers", "matplotlib", "typer"}


def test_unknown_names_raise_as_usual() -> None:
    import foveal

    with pytest.raises(AttributeError, match="module 'foveal' has no attribute 'atention'"):
        _ = foveal.atention
