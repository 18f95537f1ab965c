"""A progress bar on stderr: one line that says what happens now, how far it is, and how long it took so far."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from .guard import errors


@contextlib.contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """``with bar() as report: report(what, done, total)``; without a terminal, each new ``what`` is one line."""
    console = errors()
    if not console.is_terminal:
        last = ""

        def line(what: str, done: int, total: int) -> None:
            nonlocal last
            if what != last:
                console.print(f"[{done}/{total}] {what}", markup=False, soft_wrap=True)
            last = what

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def update(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield update
