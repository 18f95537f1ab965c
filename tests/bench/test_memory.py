"""Peak memory: what lives only for a moment counts, what was there before does not."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from foveal.bench.memory import MIB, PeakMemory

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="resident memory is read from /proc, which only Linux has"
)


def touch(mb: int) -> torch.Tensor:
    return torch.ones(mb * MIB, dtype=torch.uint8)


def test_memory_that_is_gone_again_still_counts() -> None:
    with PeakMemory() as peak:
        touch(200)
    assert 190 < peak.extra_mb < 260


def test_memory_from_before_does_not_count() -> None:
    held = touch(200)
    with PeakMemory() as peak:
        small = touch(20)
    assert peak.extra_mb < 60
    assert held.numel() > small.numel()


def test_the_high_water_mark_catches_what_no_sample_sees() -> None:
    """Without the kernel's mark, a sampler that sleeps through the work sees nothing."""
    with PeakMemory(period=30.0) as peak:
        touch(200)
    assert peak.extra_mb > 190


def test_memory_that_was_freed_before_counts_when_it_is_used_again() -> None:
    pieces = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]  # too small to be given back one by one
    keep = pieces[-1]
    del pieces
    with PeakMemory() as peak:
        again = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]
    assert peak.extra_mb > 150
    assert keep.numel() == again[0].numel()


def test_freed_blocks_go_back_when_asked() -> None:
    """In a process of its own: glibc's limit has grown to 32 MiB there, and a freed block of 16 MiB below another stays resident."""
    code = (
        "import sys; from foveal.bench.memory import MIB, _resident, return_freed_blocks\n"
        "import torch\n"
        "if sys.argv[1] == 'asked': return_freed_blocks()\n"
        "for _ in range(3): torch.ones(20 * MIB, dtype=torch.uint8)\n"
        "low, above = torch.ones(16 * MIB, dtype=torch.uint8), torch.ones(16 * MIB, dtype=torch.uint8)\n"
        "before = _resident(); del low; print((before - _resident()) / MIB)"
    )
    freed = {
        word: float(subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True).stdout)
        for word in ("asked", "not asked")
    }  # fmt: skip
    assert freed["asked"] > 14 > 2 > freed["not asked"]
