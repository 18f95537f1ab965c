"""Peak memory of a piece of work, beyond what was there before it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self

import torch

MIB = 1 << 20


class PeakMemory:
    """Context manager; afterwards ``extra_mb`` is the peak in MiB above the level at entry.

    On CUDA it is the allocator's own peak. On CPU it is the process's resident memory, sampled by a thread every few
    milliseconds (``/proc/self/statm``; on systems without it ``extra_mb`` stays 0.0): allocations that live shorter than
    that may be missed, pages that the allocator keeps from earlier work count as there before.

    Args:
        device: where the work runs.
        period: seconds between samples.
    """

    def __init__(self, device: torch.device | str = "cpu", period: float = 0.004) -> None:
        self.device, self.period, self.extra_mb = torch.device(device), period, 0.0

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
            return self
        self._before = self._peak = _resident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.extra_mb = (torch.cuda.max_memory_allocated(self.device) - self._before) / MIB
            return
        self._stop.set()
        self._thread.join()
        self.extra_mb = max(0, max(self._peak, _resident()) - self._before) / MIB

    def _sample(self) -> None:
        while not self._stop.wait(self.period):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    """Resident bytes of this process, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * _page_size()


def _page_size() -> int:
    import resource

    return resource.getpagesize()
