"""One clear message for every foreseen failure, and the exit codes: 2 for an error, 130 for an interruption."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from ..core.errors import ConfigError, FovealError

if TYPE_CHECKING:
    from rich.console import Console

DEBUG = "FOVEAL_DEBUG"
"""Environment variable: show tracebacks."""

ERROR, INTERRUPTED = 2, 130

_EXTRAS = {
    "transformers": "hf", "safetensors": "hf", "accelerate": "hf", "gguf": "hf", "tokenizers": "hf",
    "matplotlib": "report", "jinja2": "report",
}  # fmt: skip


class GuardedGroup(TyperGroup):
    """The root group: turns errors of its verbs into one message on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with plain_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            complain("interrupted; what was computed is kept.", label="")
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # the reader of our output went away, as in `foveal papers | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except Exception as error:
            message = explain(error)
            if message is None:
                raise
            if os.environ.get(DEBUG, "") not in ("", "0"):
                import traceback

                traceback.print_exception(error)
            complain(message)
            raise typer.Exit(ERROR) from None


def explain(error: Exception) -> str | None:
    """The message for a failure that is the input's or the machine's fault; None for a bug, which keeps its traceback."""
    if isinstance(error, FovealError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in _EXTRAS:
        package = (error.name or "").split(".")[0]
        return f"this needs the package {package}, which is not installed: pip install 'foveal[{_EXTRAS[package]}]'."
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return (
            "this needs the package torch, which is not installed: pip install torch. `foveal info` works without it."
        )
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
        where = f"{error.filename}: " if error.filename else ""
        kept = error.errno in (errno.ENOSPC, errno.EDQUOT)
        step = " Free some space, or choose another --out, and run the same command again: what was computed is kept."
        return f"{where}{error.strerror or error}.{step if kept else ''}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory; use a smaller --context, or --dtype bfloat16."
    return None


def complain(message: str, label: str = "error: ") -> None:
    """Print a message to stderr, unwrapped and with nothing in it read as markup."""
    from rich.text import Text

    console = errors()
    console.print(Text.assemble((label, "bold red"), message), soft_wrap=True)


def note(message: str) -> None:
    """Print a dim line to stderr: what happens now."""
    from rich.text import Text

    errors().print(Text(message, style="dim"), soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning to stderr."""
    complain(message, label="warning: ")


def errors() -> Console:
    """A console on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def output() -> Console:
    """A console on stdout; piped output gets room for whole tables."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, 120))


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Show Python warnings as one line without file names; foveal's own lose their ``foveal:`` prefix."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        warn(str(message).removeprefix("foveal: "))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def check_png(option: str, path: Path | None) -> None:
    """Raise :class:`ConfigError` for a picture that does not end in .png, before any work."""
    if path is not None and path.suffix != ".png":
        raise ConfigError(f"{option} {path} ends in {path.suffix!r}; expected .png.")


def write_json(path: Path, value: Any) -> None:
    """Write JSON; the file appears whole or not at all."""
    import json

    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
