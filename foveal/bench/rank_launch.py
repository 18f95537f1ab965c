"""Start local ranks by torchrun's own launcher, and take part as one of them."""

from __future__ import annotations

import datetime
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ..core.errors import ConfigError
from ..kernels.context_parallel.transport import RankError


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def launch(count: int, words: list[str], timeout: float) -> int:
    """Run ``foveal WORDS`` as ``count`` local ranks and wait; their exit code (the highest).

    Every rank that fails says why itself; when one fails the others are ended.

    Raises:
        ConfigError: a count below 1 or a timeout that is not above 0. RankError: a rank was killed.
    """
    if count < 1 or timeout <= 0:
        raise ConfigError(
            f"--ranks is {count} and --timeout {timeout:g}; expected at least 1 rank and more than 0 seconds."
        )
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", run_id="foveal",
        max_restarts=0, local_addr="127.0.0.1", monitor_interval=0.5,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "foveal", *words)
    except ChildFailedError as error:
        dead = [
            f"rank {rank} was ended by signal {-f.exitcode}" for rank, f in error.failures.items() if f.exitcode < 0
        ]
        if dead:  # it could not say so itself
            raise RankError(f"{dead[0]}; the run ends on every rank and nothing is written. Start again.") from None
        return max((f.exitcode if f.exitcode > 0 else 2) for f in error.failures.values())
    return 0


def take_part(
    *, quick: bool, impl: str, timeout: float, seed: int, out: Path | None, report: Callable[[str, int, int], None]
) -> dict[str, Any] | None:
    """Measure as one rank; the result on rank 0, which also writes it to ``out``, and None elsewhere."""
    import torch
    import torch.distributed as dist

    from .ranks import QUICK, Sizes, measure
    from .results import write_result

    def ended(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RankError(f"rank {os.environ['RANK']}: another rank failed; the run ends on every rank.")

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, ended)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
    first = dist.get_rank() == 0
    try:
        result = measure(
            QUICK if quick else Sizes(), report if first else _silent, timeout=timeout, impl=impl, seed=seed
        )
    except RankError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its message is the only one
        raise
    dist.monitored_barrier(timeout=datetime.timedelta(seconds=timeout))
    if first and out is not None:
        write_result(out, result)
    dist.destroy_process_group()
    return result if first else None


def _silent(what: str, done: int, total: int) -> None:
    return None
