"""The trial that tells emulated dtypes from real ones."""

from __future__ import annotations

import pytest
import torch

from foveal.core import speed


def test_slowdown_is_a_ratio_to_float32() -> None:
    assert speed.slowdown(torch.float32) > 0 and speed.slowdown(torch.bfloat16) > 0


def test_slowdown_follows_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    speed.slowdown.cache_clear()
    monkeypatch.setattr(speed, "_seconds", {torch.float16: 6.0, torch.float32: 0.5}.__getitem__)
    assert speed.slowdown(torch.float16) == 12.0
    speed.slowdown.cache_clear()
