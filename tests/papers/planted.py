"""Planted times for measures that need a GPU, which tests run at a tiny size on CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.papers.measures import gpu

CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "repeats": 1}


def planted(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[str, int], float]) -> None:
    """Every job runs once, and is said to take ``seconds(its name, how many measurements came before)``."""
    calls = 0

    def fixed(jobs: Mapping[str, Callable[[], Any]], repeats: int, **_: Any) -> dict[str, list[float]]:
        nonlocal calls
        for job in jobs.values():
            job()
        calls += 1
        return {name: [seconds(name, calls - 1)] * repeats for name in jobs}

    monkeypatch.setattr(gpu, "interleaved", fixed)


def stored(folder: Path, result: dict[str, Any]) -> bool:
    """Whether the result file holds what the measure returned."""
    file = folder / result["paper"] / f"{result['claim']}.json"
    return json.loads(file.read_text()) == json.loads(json.dumps(result))
