"""Made-up result lines of ``foveal bench`` with every kind of outcome in them."""

from __future__ import annotations

from typing import Any

MASKS = ("causal", "full_sliding:window=64", "causal_document", "uniform_block_sparse:keep=0.2")
RATES = {"native": 0.4, "gather": 0.2, "sdpa": 0.3, "flex": 0.25}


def line(mask: str, length: int, impl: str, tflops: float | None, draw: int = 0, **changes: Any) -> dict[str, Any]:
    """One line; without a rate it was refused."""
    identity = {
        "mask": mask, "length": length, "heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32", "direction": "forward", "draw": draw,
        "impl": impl,
    }  # fmt: skip
    facts = {"area": length**2, "density": 0.125, "flops": 256.0 * length**2, "drawn": {}, "load": 0.0}
    if tflops is None:
        found: dict[str, Any] = {"status": "unsupported", "why": "has no backward on CPU; use impl='gather'"}
    else:
        seconds = 256.0 * length**2 / tflops / 1e12
        found = {
            "status": "ok", "tflops": tflops, "error": 3e-7, "peak_mb": 12.5, "metadata_mb": 0.02, "prepare_s": 0.01,
            "seconds": {"median": seconds, "low": 0.9 * seconds, "high": 1.2 * seconds, "count": 5},
        }  # fmt: skip
    return {**identity, **facts, **found, **changes}


def lines() -> list[dict[str, Any]]:
    """Four masks, four lengths, both directions, four implementations; flex refuses backward, one result is wrong, one ran out of memory."""
    out = []
    for length in (1024, 2048, 4096, 8192):
        for n, mask in enumerate(MASKS):
            for direction in ("forward", "backward"):
                for impl, rate in RATES.items():
                    refused = impl == "flex" and direction == "backward"
                    bent = rate * (1 + 0.1 * n) * (1.5 if impl == "sdpa" and length == 1024 else 1)
                    note = {"note": "with a dense mask"} if impl == "sdpa" and mask != "causal" else {}
                    out.append(line(mask, length, impl, None if refused else bent, direction=direction, **note))
    out[-2].update(
        status="wrong", why="differs from float64 by 0.5 of the largest value; at most 0.0002 counts as right"
    )
    out[-3].update(status="oom", why="can't allocate memory")
    for row in out[-3:-1]:
        del row["tflops"], row["seconds"]
    return out


def header(**changes: Any) -> dict[str, Any]:
    """A header without what changes from machine to machine."""
    return {
        "foveal_bench": 1,
        "settings": {"device": "cpu", "seed": 42, "repeats": 5, "torch": "2.13.0", **changes},
        "provenance": {"torch": "2.13.0", "machine": {"cpu": "made up", "cores": 2}, "git": None, "date": "2026-01-01"},
    }
