"""Peak memory of a piece of work, beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import threading
from contextlib import suppress
from pathlib import Path
from typing import Self

import torch

MIB = 1 << 20
_M_MMAP_THRESHOLD = -3


class PeakMemory:
    """Context manager; afterwards ``extra_mb`` is the peak in MiB above the level at entry.

    On CUDA it is the allocator's own peak. On CPU it is the process's resident memory: the kernel's own high-water mark
    where Linux lets it be reset (``/proc/self/clear_refs``), and samples that a thread takes every few milliseconds
    (``/proc/self/statm``), which alone may miss what lives shorter than that. Without ``/proc``, ``extra_mb`` stays 0.0.
    What earlier work freed is given back to the system first where the C library can do that (glibc); elsewhere such pages
    count as there before, and work that uses them again seems to need less.

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
        _give_back()
        self._exact = _reset_high_water()
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
        high = _high_water() if self._exact else 0
        self.extra_mb = max(0, max(self._peak, high, _resident()) - self._before) / MIB

    def _sample(self) -> None:
        while not self._stop.wait(self.period):
            self._peak = max(self._peak, _resident())


def _give_back() -> None:
    """Freed memory goes back to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_freed_blocks() -> None:
    """From now on this process gives blocks of 1 MiB and more back to the system when they are freed.

    By itself glibc raises that limit up to 32 MiB and keeps what is smaller, so that a peak of resident memory depends on what ran
    before. Each such block is then mapped anew, which costs time. Other C libraries are left as they are.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)


def _resident() -> int:
    """Resident bytes of this process, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * _page_size()


def _reset_high_water() -> bool:
    """Whether the kernel's mark of the highest resident memory now starts again from here."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water() > 0


def _high_water() -> int:
    """Highest resident bytes since the mark was last reset, 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    except (OSError, ValueError, IndexError):
        return 0


def _page_size() -> int:
    import resource

    return resource.getpagesize()
