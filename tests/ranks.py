"""A pool of gloo ranks for tests: processes that start once for a module and run one function after another.

Not a test itself. A job is a module-level function ``job(*args)``; it runs on every rank, and what it returns comes back by rank.
"""

from __future__ import annotations

import datetime
import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_START = multiprocessing.get_context("forkserver")
_START.set_forkserver_preload(["torch", "torch.distributed", "foveal.kernels.context_parallel"])


class RankPool:
    """``with RankPool(4) as pool: results = pool.run(job, …)``; an exception on a rank is raised here with its traceback."""

    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.size = size
        self.folder = tempfile.TemporaryDirectory(prefix="foveal-ranks-")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = _START.Pipe()
            where = str(Path(self.folder.name) / "store")
            process = _START.Process(target=_rank, args=(rank, size, where, timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, job: Callable[..., Any], *args: Any) -> list[Any]:
        """What the job returned on each rank."""
        results = self.outcomes(job, *args)
        for rank, (ok, value) in enumerate(results):
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
        return [value for _, value in results]

    def outcomes(self, job: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """``(True, result)`` or ``(False, traceback)`` for each rank; a dead rank is ``(False, "dead")``."""
        for pipe in self.pipes:
            pipe.send((job.__module__, job.__qualname__, args))
        results: list[tuple[bool, Any]] = []
        for pipe in self.pipes:
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append((False, "dead"))
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self.pipes:
            try:
                pipe.send(None)
            except (BrokenPipeError, OSError):
                continue
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()


def _rank(rank: int, size: int, where: str, timeout: float, pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{where}", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout)
    )
    while (message := pipe.recv()) is not None:
        module, name, args = message
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(*args)))
        except BaseException:  # the test reads it
            pipe.send((False, traceback.format_exc()))
    os._exit(0)  # a rank that lost the others cannot say goodbye to them
