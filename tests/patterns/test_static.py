"""What is peculiar to the patterns that follow from lengths alone: windows, sinks, triangles, and their caches."""

from __future__ import annotations

import pytest
import torch

from foveal.core.base_mask import FULL
from foveal.core.context import SelectContext
from foveal.core.layouts import BlockMask, KeySelection, block_mask_kinds
from foveal.patterns import Dense, Pattern, SlidingWindow, Triangle

from ..support import Host, context, loop, tensors


def seen(pattern: Pattern, host: Host) -> torch.Tensor:
    """``(B, Nq, Nk)`` visible pairs of one head."""
    q, k, v = tensors(host, heads=1, kv_heads=1)
    return loop(q, k, v, pattern.select(q, k, context(host))[0], host)[2][:, 0] > 0


def test_the_window_counts_the_query_itself() -> None:
    rows = seen(SlidingWindow(3), Host(6, 6))[0]
    assert rows[5].nonzero()[:, 0].tolist() == [3, 4, 5]
    assert torch.equal(seen(SlidingWindow(1), Host(6, 6))[0], torch.eye(6, dtype=torch.bool))


def test_a_bidirectional_window_opens_to_both_sides() -> None:
    assert seen(SlidingWindow(2), Host(6, 6, causal=False))[0, 3].nonzero()[:, 0].tolist() == [2, 3, 4]


def test_sinks_are_the_first_real_tokens_of_each_sequence() -> None:
    padded = seen(SlidingWindow(2, sinks=2), Host(12, 12, pads=((0, 0), (4, 0))))
    assert padded[:, 11].nonzero().tolist() == [[0, 0], [0, 1], [0, 10], [0, 11], [1, 4], [1, 5], [1, 10], [1, 11]]
    packed = seen(SlidingWindow(2, sinks=1), Host(9, 9, documents=((3, 6),)))[0]
    assert packed[8].nonzero()[:, 0].tolist() == [3, 7, 8]
    assert packed[2].nonzero()[:, 0].tolist() == [0, 1, 2]


def test_one_new_token_gets_a_short_list() -> None:
    layout, _ = SlidingWindow(5, sinks=3).select(
        torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 5000, 4), context(Host(1, 5000))
    )
    assert isinstance(layout, KeySelection)
    assert layout.index.shape == (1, 1, 1, 8)


def test_a_window_that_holds_everything_is_dense() -> None:
    for pattern in (SlidingWindow(40), Triangle(40)):
        assert pattern.select(torch.zeros(1, 1, 40, 4), torch.zeros(1, 1, 40, 4), context(Host(40, 40)))[0] is None
    layout, _ = SlidingWindow(40).select(torch.zeros(1, 1, 41, 4), torch.zeros(1, 1, 41, 4), context(Host(41, 41)))
    assert layout is not None
    assert not seen(SlidingWindow(40), Host(41, 41))[0, 40, 0]


def test_tiles_outside_window_and_sinks_are_dropped_and_inner_ones_whole() -> None:
    host = Host(1280, 1280)
    layout, _ = SlidingWindow(512, sinks=4).select(
        torch.zeros(1, 1, 1280, 4), torch.zeros(1, 1, 1280, 4), context(host)
    )
    assert isinstance(layout, BlockMask)
    last = block_mask_kinds(layout)[0, 0, 9].tolist()
    assert last == [1, 0, 0, 0, 0, 1, FULL, FULL, FULL, FULL]  # the layout need not repeat causality


@pytest.mark.parametrize("pattern", [SlidingWindow(9, sinks=2), Triangle(9, 2, 4)], ids=str)
def test_layouts_are_made_once_per_base_mask(pattern: Pattern) -> None:
    base = Host(300, 300).base()
    q = torch.zeros(1, 1, 300, 4)
    first, state = pattern.select(q, q, SelectContext(base))
    assert pattern.select(q, q, SelectContext(base))[0] is first
    other = type(pattern)(8, 2)  # type: ignore[call-arg]
    assert other.select(q, q, SelectContext(base))[0] is not first
    assert pattern.static
    assert state is None


def test_state_passes_through_untouched() -> None:
    q, mark = torch.zeros(1, 1, 300, 4), object()
    for pattern in (Dense(), SlidingWindow(9), Triangle(9)):
        assert pattern.select(q, q, context(Host(300, 300)), mark)[1] is mark


def test_the_last_rows_of_a_triangle_see_everything() -> None:
    rows = seen(Triangle(window=4, sinks=1, dense_rows=5), Host(40, 40))[0]
    assert rows[34].nonzero()[:, 0].tolist() == [0, 31, 32, 33, 34]
    for i in range(35, 40):
        assert rows[i].sum() == i + 1


def test_a_triangle_in_pieces_keeps_more_and_never_less() -> None:
    pattern, whole = Triangle(window=4, sinks=1, dense_rows=5), Host(60, 60)
    at_once = seen(pattern, whole)[0]
    for first, last in ((0, 30), (30, 60)):
        piece = seen(pattern, whole.cut(first, last))[0]
        assert (at_once[first:last, :last] <= piece).all()
    assert seen(pattern, whole.cut(0, 30))[0].sum() > at_once[:30].sum()
    assert torch.equal(seen(pattern, whole.cut(30, 60))[0], at_once[30:])


def test_triangle_decodes_densely() -> None:
    assert Triangle(4).select(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 99, 4), context(Host(1, 99)))[0] is None
    assert Triangle(4, dense_rows=0).look_ahead == "none"
    assert Triangle(4).look_ahead == "prefill"


def test_written_out() -> None:
    assert str(SlidingWindow(256)) == "sliding_window(window=256)"
    assert str(SlidingWindow(256, sinks=4)) == "sliding_window(window=256, sinks=4)"
    assert SlidingWindow(256).to_json() == {"pattern": "sliding_window", "window": 256}
    assert str(Dense()) == "dense()"
