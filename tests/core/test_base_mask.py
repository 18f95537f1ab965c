"""The model's own mask against its definition, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.core.base_mask import EMPTY, FULL, BaseMask
from foveal.core.errors import ShapeError

from ..strategies import hosts
from ..support import Host


def defined(host: Host) -> torch.Tensor:
    return torch.from_numpy(host.dense())


@settings(max_examples=200)
@given(hosts())
def test_allowed_mask_mod_and_dense_are_the_definition(host: Host) -> None:
    base, expected = host.base(), defined(host)
    assert torch.equal(base.dense(host.batch), expected)
    b, q, k = torch.meshgrid(
        torch.arange(host.batch), torch.arange(host.q_len), torch.arange(host.kv_len), indexing="ij"
    )
    assert torch.equal(base.mask_mod()(b, torch.zeros_like(b), q, k), expected)
    for row, key in ((-1, 0), (0, -1), (host.q_len, 0), (0, host.kv_len)):
        zero = torch.zeros(1, dtype=torch.long)
        assert not base.allowed(zero, zero, zero + row, zero + key).any(), "outside the lengths nothing is allowed"


@settings(max_examples=200)
@given(hosts())
def test_area_is_the_count(host: Host) -> None:
    assert host.base().area().expand(host.batch).tolist() == defined(host).sum((1, 2)).tolist()


@settings(max_examples=200)
@given(hosts(), st.sampled_from([(1, 1), (4, 4), (16, 3), (5, 8), (64, 64), (8, 1)]))
def test_full_and_empty_tiles_are_exact(host: Host, size: tuple[int, int]) -> None:
    tiles, expected = host.base().block_map(*size), defined(host)
    assert tiles.shape[1:] == (-(-host.q_len // size[0]), -(-host.kv_len // size[1]))
    for b in range(host.batch):
        for u in range(tiles.shape[1]):
            for c in range(tiles.shape[2]):
                inside = expected[b, u * size[0] : (u + 1) * size[0], c * size[1] : (c + 1) * size[1]]
                kind = int(tiles[b if tiles.shape[0] > 1 else 0, u, c])
                assert kind != FULL or inside.all(), f"tile {(b, u, c)} says FULL"
                assert kind != EMPTY or not inside.any(), f"tile {(b, u, c)} says EMPTY"
                if not host.pads:
                    assert kind == FULL or not inside.all(), f"tile {(b, u, c)} is whole and says {kind}"


@settings(max_examples=200)
@given(hosts())
def test_rank_counts_inside_the_own_sequence(host: Host) -> None:
    rank = host.base().rank.expand(host.batch, -1)
    keys = np.arange(host.kv_len)
    for b in range(host.batch):
        real = host.real(b, keys)
        assert np.array_equal(rank[b].numpy()[real], host.rank(b, keys)[real])


@settings(max_examples=200)
@given(hosts(), st.integers(1, 40))
def test_cropping_keys_keeps_the_rest(host: Host, keep: int) -> None:
    keep = min(keep, host.kv_len)
    base = host.base().crop_keys(keep)
    assert torch.equal(base.dense(host.batch), defined(host)[..., :keep])
    assert base.area().expand(host.batch).tolist() == defined(host)[..., :keep].sum((1, 2)).tolist()


def test_a_predicate_is_one_more_condition() -> None:
    table = torch.rand(2, 30, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    base = BaseMask.build(
        30,
        20,
        causal=False,
        window=9,
        valid=torch.ones(2, 20).index_fill(1, torch.tensor(3), 0),
        predicate=lambda b, h, q, k: table[b, q, k],
    )
    expected = table & (torch.arange(30)[:, None] - torch.arange(20)[None]).abs().lt(9) & (torch.arange(20) != 3)
    assert torch.equal(base.dense(2), expected)
    assert base.area().tolist() == expected.sum((1, 2)).tolist()
    tiles = base.block_map(4, 4)
    padded = torch.nn.functional.pad(expected, (0, 0, 0, 2)).view(2, 8, 4, 5, 4).transpose(2, 3)
    assert torch.equal(tiles > EMPTY, padded.any(-1).any(-1)) or (padded.any(-1).any(-1) <= (tiles > EMPTY)).all()
    assert (padded[:, :7][(tiles[:, :7] == FULL)].flatten(1).all(-1)).all()
    assert not base.plain
    assert base.key() is None


def test_only_plain_masks_have_a_key_for_shared_caches() -> None:
    assert BaseMask.build(4, 9, causal=True).key() == BaseMask.build(4, 9, causal=True).key() is not None
    assert BaseMask.build(4, 9, causal=True).key() != BaseMask.build(4, 9, causal=False).key()
    assert BaseMask.build(4, 9, causal=True).key() != BaseMask.build(4, 9, causal=True, shift=0).key()
    for changes in ({"window": 3}, {"chunk": 3}, {"valid": torch.arange(9)[None] > 0}, {"kv_offset": 2}):
        assert BaseMask.build(4, 9, causal=True, **changes).key() is None
    assert BaseMask.build(4, 9, causal=True, valid=torch.ones(2, 9)).key() is not None, "nothing is padded"


def test_offset_of_a_rolling_cache_moves_ranks_and_chunks() -> None:
    base = BaseMask.build(2, 6, causal=True, chunk=4, kv_offset=3)  # keys sit at positions 3 … 8
    assert base.rank.tolist() == [[3, 4, 5, 6, 7, 8]]
    assert base.dense()[0].tolist() == [[False, True, True, True, True, False], [False] * 5 + [True]]


def test_to_another_device_keeps_everything() -> None:
    base = Host(5, 9, window=3, pads=((2, 0), (0, 1))).base()
    assert base.to("cpu") is base
    moved = base.to("meta")
    assert (moved.lo.device.type, moved.valid.device.type, moved.rank.device.type) == ("meta",) * 3
    assert (moved.q_len, moved.kv_len, moved.shift, moved.causal, moved.plain) == (5, 9, 4, True, False)


def test_errors_name_shape_and_fix() -> None:
    with pytest.raises(ShapeError, match=r"segments has shape \(1, 4\) for 3 queries and 4 keys.*use_cache=False"):
        BaseMask.build(3, 4, causal=True, segments=torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(ShapeError, match=r"valid has shape \(1, 3\); expected \(batch, kv_len=4\)"):
        BaseMask.build(4, 4, causal=True, valid=torch.ones(1, 3))
