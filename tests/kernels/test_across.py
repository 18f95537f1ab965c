"""Lists, groups and few rows whose keys every row sees: the kernel that lays query rows across the lanes and packs no keys."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.layouts import Groups, KeySelection
from foveal.kernels import native

from ..support import assert_close
from .compare import attend, check, check_entropy, check_gradients, check_under, lowered, random_call

pytestmark = [
    pytest.mark.usefixtures("poison", "isa"),
    pytest.mark.skipif(native.unavailable() is not None, reason=f"native {native.unavailable()}"),
]


def lists(q_len: int, kv_len: int, rows: int, listed: int) -> KeySelection:
    """A list for every ``rows`` rows, in no order, with pads between its keys."""
    make = torch.Generator().manual_seed(listed)
    index = torch.stack([torch.randperm(kv_len, generator=make) for _ in range(-(-q_len // rows))])
    index[:, listed:] = -1
    return KeySelection(index[:, torch.randperm(kv_len, generator=make)][None, None], rows)


@pytest.mark.parametrize("rows", [32, 48, 63, 64, 65, 111, 112, 128])
@pytest.mark.parametrize("listed", [1, 5, 6, 63, 64, 65, 130, 200])
def test_rows_and_keys_at_the_edges_of_tiles(rows: int, listed: int) -> None:
    check(
        random_call(1, (1, 2, 2, 130, 200, 64, 64), lists(130, 200, rows, listed), causal=False),
        torch.float32,
    )


@pytest.mark.parametrize("dim, dim_v", [(1, 1), (7, 5), (16, 6), (17, 80), (24, 13), (128, 200)])
def test_any_number_of_channels(dim: int, dim_v: int) -> None:
    check(random_call(2, (2, 2, 1, 64, 150, dim, dim_v), lists(64, 150, 64, 90), causal=False), torch.float32)
    check(random_call(2, (1, 2, 1, 48, 150, dim, dim_v), causal=False), torch.float32)


@pytest.mark.parametrize("scale", [0.0, -0.4, 0.5])
@pytest.mark.parametrize("threads", [1, 3])
def test_heads_that_share_keys_and_keys_that_threads_share(scale: float, threads: int) -> None:
    """32 rows of four heads are stacked; a single task is split by its keys."""
    torch.set_num_threads(threads)
    check(random_call(3, (1, 4, 1, 32, 1200, 64, 48), causal=False, scale=scale), torch.float32)
    check(random_call(3, (2, 8, 2, 64, 700, 32, 64), lists(64, 700, 32, 650), causal=False, scale=scale), torch.float32)
    torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [(64, 128, 30, 90), (33, 1, 200, 78)], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_groups(rows: tuple[int, ...], per_head: bool) -> None:
    make, share = torch.Generator().manual_seed(4), 2 if per_head else 1
    q_all, k_all = [], []
    for head in range(2 if per_head else 1):
        own = torch.randperm(sum(rows) * share, generator=make) + head * sum(rows) * share
        q_all += own.split([n * share for n in rows])
        k_all += [torch.randperm(300, generator=make)[: 40 + 65 * n] + head * 300 for n in range(4)]
    bounds = [torch.tensor([0, *(x.numel() for x in parts)]).cumsum(0) for parts in (q_all, k_all)]
    groups = Groups(torch.cat(q_all), bounds[0], torch.cat(k_all), bounds[1], per_head)
    call = random_call(4, (1, 4, 2, sum(rows), 300, 64, 48), groups, causal=False)
    check(call, torch.float32)
    check_gradients(call, torch.float32)


def test_past_keys_of_a_causal_model_are_whole_and_its_own_are_cut() -> None:
    """Blocks of rows that see all of their keys beside some that do not, for being later, padding or before a window."""
    index = torch.full((1, 1, 4, 128), -1)
    index[0, 0, 1, :64] = torch.arange(64)
    index[0, 0, 2, :128] = torch.arange(128)
    index[0, 0, 3, :100] = torch.arange(100, 200)  # partly its own
    index[0, 0, 0, :64] = torch.arange(64)
    call = random_call(5, (2, 2, 2, 256, 256, 64, 64), KeySelection(index, 64))
    check(call, torch.float32)
    valid = torch.ones(2, 256, dtype=torch.bool)
    valid[1, 10:50] = False
    check_under(BaseMask.build(256, 256, causal=True, valid=valid), call)
    check_under(BaseMask.build(256, 256, causal=True, window=150), call)


def test_entropy() -> None:
    call = random_call(6, (1, 2, 1, 128, 300, 64, 64), lists(128, 300, 64, 200), causal=False, scale=1.0)
    check_entropy(call, torch.float32)
    index = torch.arange(300).repeat(1, 1, 3, 1)
    index[index >= 64 * torch.arange(2, 5)[:, None]] = -1
    check_entropy(
        random_call(6, (1, 2, 1, 192, 300, 64, 64), KeySelection(index, 64)), torch.float32
    )  # whole, then cut


def test_keys_and_values_of_any_strides() -> None:
    """Channels that follow each other are read in place, others are packed."""
    call, _ = lowered(random_call(7, (1, 2, 2, 64, 200, 32, 48), lists(64, 200, 64, 130), causal=False), torch.float32)
    plain = attend(call, "native")[0]

    def apart(x: Tensor) -> Tensor:
        return torch.stack([x, x + 1], -1)[..., 0]

    for change in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), apart):
        moved = foveal.attention(change(call.q), change(call.k), change(call.v), call.layout, impl="native")
        assert_close(moved, plain, 1e-6, "out")


def test_huge_minus_infinite_and_undefined_logits_stay_in_their_rows() -> None:
    call, _ = lowered(random_call(8, (1, 1, 1, 64, 200, 16, 16), lists(64, 200, 64, 150), causal=False), torch.float32)
    plain = attend(call, "native")[0]
    call.q[0, 0, 3], call.q[0, 0, 9] = 1e30, torch.nan
    out, lse = attend(call, "native")
    others = torch.tensor([i not in (3, 9) for i in range(64)])
    assert torch.equal(out[0, 0, others], plain[0, 0, others])
    assert bool(out[0, 0, 9].isnan().all()) and bool(lse[0, 0, 9].isnan())
    assert bool(out[0, 0, 3].isfinite().all())
    call.k[0, 0, :] = -torch.inf  # every logit of every row
    call.q[0, 0] = 1.0
    out, lse = attend(call, "native")
    assert bool((out == 0).all()) and bool((lse == -torch.inf).all())
