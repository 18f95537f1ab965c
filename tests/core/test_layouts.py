"""Block masks made from tile kinds, read back, and narrowed by what the model allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from foveal.core.base_mask import EMPTY, FULL, PARTIAL, BaseMask
from foveal.core.errors import ShapeError
from foveal.core.layouts import Groups, block_mask, block_mask_kinds, narrow

from ..support import Host, listed


def random_kinds(seed: int, *size: int) -> torch.Tensor:
    return torch.randint(0, 3, size, generator=torch.Generator().manual_seed(seed)).to(torch.int8)


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_kinds_survive_the_block_mask(seed: int, heads: int, rows: int, cols: int, transpose: bool) -> None:
    kinds = random_kinds(seed, 2, heads, rows, cols)
    mask = block_mask(kinds, (4, 8), (rows * 4 - 1, cols * 8 - 5), transpose=transpose)
    assert torch.equal(block_mask_kinds(mask), kinds)
    assert mask.seq_lengths == (rows * 4 - 1, cols * 8 - 5)
    assert (mask.q_indices is not None) == transpose
    if transpose:
        assert mask.q_num_blocks.sum() == (kinds == PARTIAL).sum()


@given(st.integers(0, 99), st.integers(1, 3), st.integers(1, 5), st.integers(1, 6))
def test_query_lists_are_those_of_torch(seed: int, heads: int, rows: int, cols: int) -> None:
    ours = block_mask(random_kinds(seed, 2, heads, rows, cols), (4, 8), (rows * 4, cols * 8))
    theirs = BlockMask.from_kv_blocks(
        ours.kv_num_blocks, ours.kv_indices, ours.full_kv_num_blocks, ours.full_kv_indices, BLOCK_SIZE=(4, 8)
    )
    for name in ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices"):
        mine, torchs = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(mine, torchs) and mine.dtype == torchs.dtype and mine.is_contiguous()


def test_kinds_of_a_torch_mask() -> None:
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    assert block_mask_kinds(mask)[0, 0].tolist() == [[1, 0, 0], [2, 1, 0], [2, 2, 1]]
    mask = create_block_mask(lambda b, h, q, k: k < 0, 2, 3, 40, 30, device="cpu", BLOCK_SIZE=16)
    assert (block_mask_kinds(mask) == EMPTY).all()
    assert block_mask_kinds(mask).shape == (2, 3, 3, 2)


@given(
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from([Host(30, 40), Host(30, 40, causal=False, window=9), Host(30, 40, pads=((0, 0), (17, 0)))]),
)
def test_narrow_keeps_exactly_what_both_allow(seed: int, mod: bool, host: Host) -> None:
    table = torch.rand(2, 3, 30, 40, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask = block_mask(
        random_kinds(seed, 2, 3, 4, 5), (8, 8), (30, 40), (lambda b, h, q, k: table[b, h, q, k]) if mod else None
    )
    joint = narrow(mask, host.base())
    allowed = host.dense()
    for b in range(2):
        for h in range(3):
            for i in range(30):
                (mine,), (both,) = (listed(m, b, h, i, (3, 3, 30, 40)) for m in (mask, joint))
                assert sorted(both) == sorted(j for j in mine if allowed[b % len(allowed), i, j])
    assert (block_mask_kinds(joint) <= block_mask_kinds(mask)).all()


def test_narrow_of_everything_is_the_base_mask_and_is_cached() -> None:
    base = Host(30, 40, window=7).base()
    joint = narrow(None, base, (8, 8))
    assert torch.equal(block_mask_kinds(joint)[0], base.block_map(8, 8))
    assert narrow(None, base, (8, 8)) is joint
    assert narrow(None, base, (16, 8)) is not joint


def test_a_mask_for_other_lengths_is_refused() -> None:
    mask = block_mask(random_kinds(0, 1, 1, 2, 2), (8, 8), (16, 16))
    with pytest.raises(ShapeError, match=r"\(16, 16\); expected \(16, 17\).*pass a Pattern"):
        narrow(mask, BaseMask.build(16, 17, causal=True))


def test_full_means_whole() -> None:
    assert (EMPTY, PARTIAL, FULL) == (0, 1, 2)


@given(st.data(), st.booleans(), st.booleans())
def test_groups_are_refused_exactly_when_a_list_is_wrong(data: st.DataObject, per_head: bool, rising: bool) -> None:
    batch, heads, kv_heads, q_len, kv_len = 2, 4, 2, 3, 4
    tops = (batch * heads * q_len, batch * kv_heads * kv_len) if per_head else (batch * q_len, batch * kv_len)
    sides = []
    for top, length in zip(tops, (q_len, kv_len), strict=True):
        entry = st.integers(*data.draw(st.sampled_from([(0, length - 1), (0, top - 1), (-1, top)])))
        lists = data.draw(st.lists(st.lists(entry, max_size=4, unique=True), min_size=2, max_size=2))
        sides.append([sorted(x) for x in lists] if rising else lists)

    def unit(side: int, entry: int) -> int:
        found = entry // (q_len, kv_len)[side]
        return found // heads * kv_heads + found % heads // (heads // kv_heads) if per_head and side == 0 else found

    inside = all(0 <= x < tops[side] for side in (0, 1) for one in sides[side] for x in one)
    alone = all(len({unit(side, x) for side in (0, 1) for x in sides[side][g]}) <= 1 for g in range(2))
    twice = data.draw(st.booleans()) and bool(sides[0][0])
    if twice:
        sides[0][0].append(sides[0][0][0])
    parts = []
    for lists in sides:
        parts += [
            torch.tensor(lists[0] + lists[1]).long(),
            torch.tensor([0, len(lists[0]), len(lists[0]) + len(lists[1])]),
        ]
    groups = Groups(*parts, per_head=per_head)
    if inside and alone and not twice:
        groups.validate(batch, heads, kv_heads, q_len, kv_len)
    else:
        with pytest.raises(ShapeError):
            groups.validate(batch, heads, kv_heads, q_len, kv_len)
