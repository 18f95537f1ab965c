"""What this machine is: processor, memory, compiler. Standard library only; unknown facts are None, never guesses."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_SIMD = {
    "sse4_2": "SSE4.2", "avx": "AVX", "fma": "FMA", "f16c": "F16C", "avx2": "AVX2", "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512F", "avx512bw": "AVX-512BW", "avx512_vnni": "AVX-512-VNNI", "avx512_bf16": "AVX-512-BF16",
    "avx512_fp16": "AVX-512-FP16", "amx_tile": "AMX", "amx_bf16": "AMX-BF16", "amx_int8": "AMX-INT8",
    "asimd": "NEON", "asimdhp": "NEON-FP16", "asimddp": "NEON-DOT", "sve": "SVE", "sve2": "SVE2", "bf16": "BF16", "i8mm": "I8MM",
}  # fmt: skip
"""Flags of /proc/cpuinfo that matter to attention kernels, and their usual names."""


def machine() -> dict[str, Any]:
    """Facts for a result file: ``cpu``, ``cores`` usable by this process, ``memory_gb``, ``architecture``, ``os``."""
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gb": memory_gb(),
        "architecture": platform.machine(),
        "os": operating_system(),
    }


def cpu_model() -> str | None:
    """The processor's own name, such as ``"AMD EPYC 9354"``."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "cpu model") and value.strip():
            return value.strip()
    if platform.system() == "Darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or None


def usable_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def simd_flags() -> list[str]:
    """Vector extensions that the processor offers, by their usual names; empty where the system does not tell."""
    for line in _lines("/proc/cpuinfo"):
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            present = set(value.split())
            return [name for flag, name in _SIMD.items() if flag in present]
    return []


def memory_gb() -> float | None:
    """Physical memory in GB (10⁹ bytes), or the control group's limit where that is lower."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    for line in _lines("/sys/fs/cgroup/memory.max"):
        if line.strip().isdigit():
            total = min(total, int(line))
    return round(total / 1e9, 1)


def compiler() -> str | None:
    """First line of what the C++ compiler says of itself, or None when there is none on the path."""
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            said = _output(name, "--version")
            return said.splitlines()[0] if said else name
    return None


def operating_system() -> str:
    """Name and version, such as ``"Debian GNU/Linux 12 (bookworm), Linux 6.1"``."""
    kernel = f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {kernel}"
    except (OSError, KeyError):
        return kernel


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
