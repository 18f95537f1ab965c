"""Bands of Re-ttention: images, videos in both orders, and the density that dense text rows really cost."""

from __future__ import annotations

import pytest
import torch

from foveal.core.base_mask import BaseMask
from foveal.core.context import SelectContext
from foveal.core.density import measure
from foveal.core.errors import ShapeError
from foveal.core.layouts import BlockMask
from foveal.kernels.call import AttentionCall
from foveal.kernels.reference import visible_pairs
from foveal.patterns import FrameBand


def select(pattern: FrameBand, length: int) -> tuple[BlockMask | None, BaseMask]:
    base = BaseMask.build(length, length, causal=False)
    layout, _ = pattern.select(torch.empty(1, 1, 0, 4), torch.empty(1, 1, 0, 4), SelectContext(base=base))
    assert layout is None or isinstance(layout, BlockMask)
    return layout, base


def seen(pattern: FrameBand, length: int) -> torch.Tensor:
    layout, base = select(pattern, length)
    x = torch.zeros(1, 1, length, 4)
    return visible_pairs(AttentionCall(x, x, x, layout, base, 1.0))[0, 0]


def test_an_image_of_4096_tokens_keeps_129_of_them() -> None:
    pattern = FrameBand(1 / 32)
    assert pattern.half(4096) == 64
    rows = seen(pattern, 4096)
    assert int(rows[2000].sum()) == 129 and int(rows[0].sum()) == 65


@pytest.mark.parametrize("order", ["frames", "places"])
def test_a_video_query_sees_the_band_in_every_frame_and_text_both_ways(order: str) -> None:
    text, frames, size = 7, 5, 30
    pattern = FrameBand(0.2, frames, text, order)  # type: ignore[arg-type]
    rows = seen(pattern, text + frames * size)
    slot = torch.arange(frames * size)
    place = slot % size if order == "frames" else slot // frames
    expected = torch.ones_like(rows)
    expected[text:, text:] = (place[:, None] - place).abs() <= 3
    assert torch.equal(rows, expected)


def test_interleaved_frames_touch_fewer_tiles() -> None:
    tiles = {}
    for order in ("frames", "places"):
        pattern = FrameBand(1 / 32, 8, 128, order)  # type: ignore[arg-type]
        layout, base = select(pattern, 128 + 8 * 512)
        tiles[order] = measure(layout, base, 1, 1).tile_density
    assert tiles["places"] < 0.5 * tiles["frames"]


def test_cogvideox_keeps_5_6_percent_and_not_3_1() -> None:
    layout, base = select(FrameBand(1 / 32, 13, 226), 226 + 13 * 1350)
    assert FrameBand(1 / 32).half(1350) == 21
    assert round(100 * measure(layout, base, 1, 1).density, 1) == 5.6


def test_frames_of_unequal_size_are_refused() -> None:
    with pytest.raises(ShapeError, match="frames is 3 and the sequence has 100 tokens with text = 2"):
        select(FrameBand(0.1, 3, 2), 100)
