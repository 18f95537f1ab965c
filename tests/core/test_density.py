"""Density counts visible pairs over allowed pairs; tile density counts what is computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from foveal.core.density import Density, measure
from foveal.core.layouts import BlockMask, KeySelection, block_mask
from foveal.patterns import SlidingWindow

from ..strategies import Call, calls
from ..support import Host, context, loop


@given(calls())
def test_pairs_are_counted_exactly(call: Call) -> None:
    *_, seen = loop(call.q, call.k, call.v, call.layout, call.host)
    found = measure(call.layout, call.host.base(), call.q.shape[0], call.q.shape[1], call.k.shape[1])
    assert found.pairs == int(seen.sum())
    assert found.allowed == int(call.host.dense().sum()) * call.q.shape[1]
    if call.layout is None or isinstance(call.layout, BlockMask):
        assert found.tiles <= found.allowed_tiles
        assert (found.tiles > 0) >= (found.pairs > 0)


def test_dense_is_one() -> None:
    for host in (Host(300, 300), Host(7, 300), Host(300, 300, window=20), Host(5, 5, pads=((2, 0), (0, 0)))):
        found = measure(None, host.base(), host.batch, 4)
        assert (found.density, found.tile_density) == (1.0, 1.0)


def test_window_of_one_over_four_tokens() -> None:
    host = Host(4, 4)
    layout, _ = SlidingWindow(1).select(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), context(host))
    found = measure(layout, host.base(), 1, 2)
    assert (found.pairs, found.allowed) == (8, 20)
    assert found.density == pytest.approx(0.4)


def test_lists_count_keys_gathered_per_row() -> None:
    lists = KeySelection(torch.tensor([[[[0, 1, -1, -1], [0, 3, 2, -1]]]]), 2)
    found = measure(lists, Host(4, 4).base(), 1, 4, 2)
    assert found.pairs == 4 * (1 + 2 + 2 + 3)
    assert found.tiles == 4 * (2 * 2 + 3 * 2)
    assert found.allowed_tiles == 4 * (2 * 2 + 4 * 2)


def test_tiles_of_a_block_mask() -> None:
    mask = block_mask(torch.tensor([[[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]], dtype=torch.int8), (2, 2), (6, 6))
    found = measure(mask, Host(6, 6).base(), 3, 4)
    assert (found.tiles, found.allowed_tiles) == (5 * 12, 6 * 12)
    assert found.tile_density == pytest.approx(5 / 6)
    assert found.pairs == (3 + 4 + 3 + 4 + 3) * 12


def test_sums_and_nothing() -> None:
    both = Density(1, 4, 2, 8) + Density(3, 4, 2, 8)
    assert both == Density(4, 8, 4, 16)
    assert (both.density, both.tile_density) == (0.5, 0.25)
    assert (Density(0, 0, 0, 0).density, Density(0, 0, 0, 0).tile_density) == (0.0, 0.0)
