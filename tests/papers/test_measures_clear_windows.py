"""CLEAR beside shifted windows: the windows are what Swin's are, the work is counted right, and the result follows."""

from __future__ import annotations

import json

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.papers.cards import load_card
from foveal.papers.measures import clear_windows


@pytest.mark.parametrize("shift", [0, 3])
def test_windows_keep_what_lies_in_the_same_window(shift):
    pattern = clear_windows.Windows(7, shift, 14, 3)
    n = 3 + 14 * 14
    q = torch.zeros(1, 1, n, 4)
    base = BaseMask.build(n, n, causal=False)
    layout, _ = pattern.select(q, q, SelectContext(base=base))
    kept = layout.mask_mod(
        torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long),
        torch.arange(n)[:, None], torch.arange(n)[None],
    )  # fmt: skip
    at = torch.arange(14) + (7 - shift)
    window = torch.stack(torch.meshgrid(at // 7, at // 7, indexing="ij"), -1).flatten(0, 1)
    wanted = torch.ones(n, n, dtype=torch.bool)
    wanted[3:, 3:] = (window[:, None] == window[None]).all(-1)
    assert torch.equal(kept, wanted)
    assert pattern.pairs() == int(wanted.sum())


def test_the_disc_does_no_more_work_than_the_windows():
    assert 0.9 < clear_windows.DISC.pairs() / clear_windows.pairs_of(clear_windows.swin()) <= 1


def test_the_result_is_what_the_card_reads(monkeypatch, tmp_path):
    monkeypatch.setattr(clear_windows, "TEACHER_STEPS", 2)
    monkeypatch.setattr(clear_windows, "PAINTED", 4)
    monkeypatch.setattr(clear_windows, "FRESH", 4)
    clear_windows.teacher_of.cache_clear()
    result = clear_windows.measure_windows(seeds=1, steps=1, out=tmp_path)
    clear_windows.teacher_of.cache_clear()
    assert json.loads((tmp_path / "clear" / "disc-beats-swin.json").read_text()) == result
    claim = next(c for c in load_card("clear").claims if c.id == "disc-beats-swin")
    assert claim.measured_by == "foveal.papers.measures.clear_windows:measure_windows"
    run = result["measured"]["runs"][0]
    assert set(run) == {"disc", "windows", "disc, untuned", "windows, untuned"}
    assert all(v["features"] > 0 for v in run.values())
