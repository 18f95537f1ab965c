"""The C++ kernels against the reference: every layout that they take, edges of tiles, every instruction set of this machine."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.errors import ShapeError, UnsupportedError
from foveal.core.layouts import Groups, KeySelection, Layout, block_mask
from foveal.kernels import native
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute
from foveal.kernels.native.plan import visible
from foveal.patterns import SlidingWindow

from ..strategies import Call, calls, finite, hosts, random_blocks, random_groups, random_lists
from ..support import assert_close
from .compare import (
    attend,
    check,
    check_demand,
    check_entropy,
    check_gradients,
    check_under,
    gradients,
    lowered,
    random_call,
)
from .isas import VARIANTS, on

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif(native.unavailable() is not None, reason=f"native {native.unavailable()}"),
]
KINDS = pytest.mark.parametrize("kind", ["dense", "blocks", "lists", "groups"])
if native.unavailable() is None:
    from foveal.kernels.native import ops


@KINDS
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_gradients_of_random_calls(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    check_gradients(data.draw(calls(kind)), dtype)


@KINDS
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_random_calls(kind: str, dtype: torch.dtype, data: st.DataObject) -> None:
    check(data.draw(calls(kind)), dtype)


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_entropy_in_the_same_pass(dtype: torch.dtype, data: st.DataObject) -> None:
    check_entropy(data.draw(calls(data.draw(st.sampled_from(["dense", "blocks", "lists"])))), dtype)


@pytest.mark.parametrize(
    "sizes", [(1, 2, 1, 300, 1100, 64, 48), (1, 2, 1, 1, 1500, 64, 64), (2, 4, 2, 5, 390, 33, 16)], ids=str
)
def test_entropy_over_many_keys_on_every_instruction_set(isa: str, sizes: tuple[int, ...]) -> None:
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        check_entropy(random_call(21, sizes), dtype)
        check_entropy(random_call(21, sizes, scale=3.0, causal=False), dtype)
    torch.set_num_threads(1)


def test_entropy_refuses_a_query_in_several_groups() -> None:
    call, _ = lowered(random_call(0, (1, 1, 1, 20, 20, 8, 8)), torch.float32)
    rows, bounds = torch.arange(20).repeat(2), torch.tensor([0, 20, 40])
    call.layout = Groups(rows, bounds, rows, bounds)
    with pytest.raises(UnsupportedError, match="a query in several groups"):
        native.attend_with_entropy(call.prepared())


SIZES = [
    (1, 1, 1, 1, 1, 16, 16),
    (1, 1, 1, 63, 63, 64, 64),
    (1, 1, 1, 64, 64, 64, 64),
    (2, 1, 1, 65, 65, 64, 64),
    (1, 2, 1, 95, 127, 64, 64),
    (1, 2, 2, 97, 129, 32, 80),
    (1, 3, 1, 128, 191, 33, 17),
    (1, 2, 2, 127, 300, 64, 64),
    (1, 1, 1, 129, 257, 128, 128),
    (1, 2, 1, 7, 320, 256, 256),
    (1, 1, 1, 200, 70, 96, 192),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
def test_edges_of_tiles_on_every_instruction_set(
    isa: str, sizes: tuple[int, ...], causal: bool, dtype: torch.dtype
) -> None:
    check(random_call(0, sizes, causal=causal), dtype)
    check_gradients(random_call(0, sizes, causal=causal), dtype)


def test_keys_that_many_rows_see_keep_their_digits(isa: str) -> None:
    """Sums over 4096 rows are made panel by panel: float32's error, not 4096 roundings of one growing number."""
    call = random_call(5, (1, 8, 2, 1024, 1024, 64, 64), causal=True)
    low, exact = lowered(call, torch.float32)
    got, expected = gradients(low, "native"), gradients(exact, "reference")
    for name in ("k", "v"):
        assert (got[name] - expected[name]).abs().max() < 1e-6 * expected[name].abs().max()


FEW = {
    "decode": (1, 9, 3, 1, 700, 64, 64),
    "one head, keys are split": (1, 1, 1, 1, 1500, 64, 48),
    "a few rows after a cache": (2, 4, 2, 5, 390, 33, 16),
    "as many rows as are few": (1, 2, 1, 48, 300, 64, 64),
    "wide": (1, 2, 2, 3, 600, 128, 200),
}


@pytest.mark.parametrize("sizes", FEW.values(), ids=FEW)
@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_few_rows_on_every_instruction_set(isa: str, sizes: tuple[int, ...], dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    bias = torch.linspace(-1, 1, sizes[1] * 21, dtype=torch.float64).view(sizes[1], 21)
    check(random_call(11, sizes), dtype)
    check(random_call(11, sizes, causal=False, scale=-0.3, softcap=2.0), dtype)
    check(random_call(11, sizes, bias=bias), dtype)
    batch, heads, kv_heads, q_len, kv_len, *_ = sizes
    make = torch.Generator().manual_seed(1)
    for of_heads in (1, kv_heads, heads):
        lists = random_lists(make, batch, of_heads, q_len, kv_len, 3, kv_len // 3, True)
        check(random_call(12, sizes, lists), dtype)
    check(random_call(13, sizes, random_blocks(make, batch, heads, q_len, kv_len, (64, 64), True)), dtype)
    torch.set_num_threads(1)


@pytest.mark.parametrize("block", [1, 16, 100, 130])
@pytest.mark.parametrize("of_heads", [1, 2, 6])
def test_lists_of_keys_on_every_instruction_set(isa: str, block: int, of_heads: int) -> None:
    sizes = (2, 6, 2, 210, 330, 64, 48)
    lists = random_lists(torch.Generator().manual_seed(2), 2, of_heads, 210, 330, block, 150, True)
    for dtype in (torch.float32, torch.bfloat16):
        check(random_call(14, sizes, lists), dtype)
        check_gradients(random_call(14, sizes, lists), dtype)
    whole = KeySelection(torch.arange(330).expand(1, 1, -(-210 // block), -1), block)
    check(random_call(15, sizes, whole), torch.float32)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("combine", ["softmax", "mean", "disjoint"])
def test_groups_on_every_instruction_set(isa: str, combine: str, per_head: bool) -> None:
    sizes = (2, 6, 2, 310, 290, 64, 48)
    make = torch.Generator().manual_seed(3)
    if combine == "disjoint":
        groups = disjoint_groups(make, sizes[:5], 5, per_head)
    else:
        groups = random_groups(make, sizes[:5], 9, per_head, combine)
    for dtype in (torch.float32, torch.bfloat16):
        check(random_call(16, sizes, groups), dtype)
        check_gradients(random_call(16, sizes, groups), dtype)
    bias = torch.linspace(-1, 1, 6 * 41, dtype=torch.float64).view(6, 41)
    check(random_call(17, sizes, groups, scale=-0.3, softcap=2.0, bias=bias), torch.float32)
    check_gradients(random_call(17, sizes, groups, scale=-0.3, softcap=2.0, bias=bias), torch.float32)


def test_joint_groups_longer_and_shorter_than_what_is_packed_at_once(isa: str) -> None:
    """A long group, packed block by block, between two that are packed whole and share rows with it."""
    rows, keys = (
        [torch.arange(150), torch.arange(200), torch.arange(40, 140)],
        [torch.arange(60), torch.arange(700), torch.arange(188, 700)],
    )
    bounds = [torch.tensor([0, *(x.numel() for x in parts)]).cumsum(0) for parts in (rows, keys)]
    groups = Groups(torch.cat(rows), bounds[0], torch.cat(keys), bounds[1], combine="softmax")
    for dtype in (torch.float32, torch.bfloat16):
        check(random_call(18, (1, 4, 2, 200, 700, 64, 64), groups), dtype)


@pytest.mark.parametrize("threads", [1, 2])
def test_groups_that_leave_rows_without_keys(threads: int) -> None:
    """Rows of no group, and rows of a group that has no keys, are zero; where every row has keys nothing is cleared beforehand."""
    torch.set_num_threads(threads)
    rows, keys = torch.randperm(500, generator=torch.Generator().manual_seed(0)), torch.arange(300)

    def groups(row_bounds: list[int], key_bounds: list[int]) -> Groups:
        return Groups(
            rows[: row_bounds[-1]], torch.tensor(row_bounds), keys[: key_bounds[-1]], torch.tensor(key_bounds)
        )

    for layout in (
        groups([0, 30, 470, 500], [0, 200, 230, 300]),
        groups([0, 30, 470, 499], [0, 200, 230, 300]),
        groups([0, 30, 470, 500], [0, 200, 200, 300]),
    ):
        call = random_call(19, (1, 4, 2, 500, 300, 64, 64), layout, causal=False)
        check(call, torch.float32)
        check_gradients(call, torch.float32)
    torch.set_num_threads(1)


def disjoint_groups(make: torch.Generator, sizes: tuple[int, ...], count: int, per_head: bool) -> Groups:
    """Every query in exactly one group of its head, in no order; keys in any."""
    batch, heads, kv_heads, q_len, kv_len = sizes
    q_all, k_all = [], []
    for owner in range(batch * (kv_heads if per_head else 1)):
        share = heads // kv_heads if per_head else 1
        rows = torch.randperm(share * q_len, generator=make) + owner * share * q_len
        q_all += list(rows.tensor_split(torch.randint(0, rows.numel(), (count - 1,), generator=make).sort().values))
        k_all += [torch.randperm(kv_len, generator=make)[: kv_len // (n + 1)] + owner * kv_len for n in range(count)]
    bounds = [torch.tensor([0, *(x.numel() for x in parts)]).cumsum(0) for parts in (q_all, k_all)]
    return Groups(torch.cat(q_all), bounds[0], torch.cat(k_all), bounds[1], per_head)


def test_packed_documents_equal_each_document_alone() -> None:
    q_bounds, k_bounds = torch.tensor([0, 70, 70, 71, 260]), torch.tensor([0, 90, 130, 150, 310])
    q, k, v = (
        torch.randn(1, h, n, 32, generator=torch.Generator().manual_seed(h)) for h, n in ((4, 260), (2, 310), (2, 310))
    )
    out, lse = foveal.attention(q, k, v, Groups.packed(q_bounds, k_bounds), impl="native", return_lse=True)
    for i in range(4):
        rows, keys = slice(*q_bounds[i : i + 2].tolist()), slice(*k_bounds[i : i + 2].tolist())
        want, want_lse = foveal.attention(
            *(x.double() for x in (q[:, :, rows], k[:, :, keys], v[:, :, keys])), impl="reference", return_lse=True
        )
        assert_close(out[:, :, rows], want, 1e-5)
        assert_close(lse[:, :, rows], want_lse, 1e-5)


@pytest.mark.parametrize("tile", [(64, 64), (128, 128), (128, 64), (16, 16), (1, 8), (96, 48), (200, 130)], ids=str)
@pytest.mark.parametrize("mod", [False, True])
def test_block_masks_on_every_instruction_set(isa: str, tile: tuple[int, int], mod: bool) -> None:
    sizes = (2, 4, 2, 270, 330, 64, 48)
    mask = random_blocks(torch.Generator().manual_seed(sum(tile)), 2, 4, 270, 330, tile, mod)
    for causal in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            check(random_call(1, sizes, mask, causal), dtype)
            check_gradients(random_call(1, sizes, mask, causal), dtype)
    bias = torch.linspace(-1, 1, 4 * 161, dtype=torch.float64).view(4, 161)
    check(random_call(2, sizes, mask, True, softcap=1.5, scale=-0.4, bias=bias), torch.float32)
    check_gradients(random_call(2, sizes, mask, True, softcap=1.5, scale=-0.4, bias=bias), torch.float32)


def test_padding_among_the_keys_of_cut_tiles(isa: str) -> None:
    """Holes that no interval of keys tells: in tiles as wide as a panel, wider and narrower."""
    valid = torch.rand(2, 200, generator=torch.Generator().manual_seed(0)) < 0.7
    base = BaseMask.build(130, 200, causal=False, valid=valid)
    for tile in ((64, 64), (65, 128), (32, 32)):
        mask = random_blocks(torch.Generator().manual_seed(1), 2, 2, 130, 200, tile, True)
        check_under(base, random_call(3, (2, 2, 1, 130, 200, 32, 32), mask))


@KINDS
@settings(max_examples=30)
@given(data=st.data())
def test_every_demand_of_a_host(kind: str, data: st.DataObject) -> None:
    call = data.draw(calls(kind, longest=30))
    batch, heads, q_len = call.q.shape[:3]
    host = data.draw(hosts((q_len, call.k.shape[2]), batch))
    base = host.base()
    if data.draw(st.booleans()):
        table = torch.rand(batch, q_len, host.kv_len, generator=torch.Generator().manual_seed(heads)) < 0.6
        base.predicate, base.plain = lambda b, h, q, k: table[b, q, k], False
        base.cache["predicate_batch"] = batch
    if kind in ("lists", "groups") and base.predicate is not None:
        low, _ = lowered(call, torch.float32)
        with pytest.raises(UnsupportedError, match="cannot ask the host's own mask about single keys"):
            compute(AttentionCall(low.q, low.k, low.v, call.layout, base, 0.7), "native")
        return
    check_demand(base, call)


@pytest.mark.parametrize("dtype", native.TYPES, ids=str)
def test_any_strides_without_copies(dtype: torch.dtype) -> None:
    make = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 150, 2, 2, 72, generator=make).to(dtype)  # (batch, tokens, k or v, heads, channels)
    q = torch.randn(2, 130, 4, 72, generator=make).to(dtype).transpose(1, 2)
    k, v = cache[:, 7:137, 0].transpose(1, 2), cache[:, 7:137, 1].transpose(1, 2)
    views = [
        (q, k, v),
        (q[..., ::2], k[..., ::2], v[..., 1::3]),
        (q[:, :, ::2], k[:, :, :65], v[:, :, :65]),
        (q, k[:, :1].expand(-1, 2, -1, -1), v[:1].expand(2, -1, -1, -1)),
        (q[..., 1:], k[..., :-1], v[..., 1:2]),
        (q.flip(2), k, v.flip(3)),
    ]
    for q_view, k_view, v_view in views:
        loose, packed = Call(q_view, k_view, v_view, None, True, {}), [t.contiguous() for t in (q_view, k_view, v_view)]
        out, lse = attend(loose, "native")
        same, same_lse = attend(Call(*packed, None, True, {}), "native")
        assert torch.equal(out, same)
        assert torch.equal(lse, same_lse)
        both = [[t.detach().requires_grad_() for t in (q_view, k_view, v_view)], [t.requires_grad_() for t in packed]]
        grads = [
            torch.autograd.grad(attend(Call(*leaves, None, True, {}), "native")[0].sum(), leaves) for leaves in both
        ]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("isa", VARIANTS)
@pytest.mark.parametrize("kv_len", [130, 192, 255])
def test_what_lies_behind_values_is_not_read(kv_len: int, isa: str) -> None:
    q, k, cache = (torch.randn(2, 2, n, 64, generator=torch.Generator().manual_seed(n)) for n in (200, kv_len, 256))
    v = cache[:, :, :kv_len]
    want, _ = attend(Call(q, k, v.clone(), None, True, {}), "native")
    cache[:, :, kv_len:] = torch.nan
    with on(isa):
        out, _ = attend(Call(q, k, v, None, True, {}), "native")
    assert_close(out, want, 1e-5)


def test_rows_that_see_nothing(isa: str) -> None:
    kinds = torch.tensor([[[[0, 0, 0], [1, 2, 0], [0, 0, 2]]]], dtype=torch.int8)
    mask = block_mask(kinds, (64, 64), (150, 170), lambda b, h, q, k: q < 70)
    call = random_call(3, (1, 2, 1, 150, 170, 32, 32), mask, False)
    low, _ = lowered(call, torch.float32)
    out, lse = attend(low, "native")
    blind = torch.zeros(150, dtype=torch.bool)
    blind[:64] = True
    assert (out[:, :, blind] == 0).all()
    assert (lse[:, :, blind] == -torch.inf).all()
    assert lse[:, :, ~blind].isfinite().all()
    grads = gradients(low, "native")
    assert (grads["q"][:, :, blind] == 0).all()
    assert all(g.isfinite().all() for g in grads.values())
    check_gradients(call, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_and_minus_infinite_logits(isa: str, dtype: torch.dtype) -> None:
    call = random_call(4, (1, 2, 1, 70, 140, 16, 16), causal=False, scale=1.0)
    call.q, call.k = call.q.abs() + 0.1, call.k * 1e4
    call.k[0, 0, 5:70] = -math.inf  # those keys have logit −inf for every row
    low, exact = lowered(call, dtype)
    out, lse = attend(low, "native")
    want, want_lse = attend(exact, "reference")
    assert_close(out, want, 1e-3 if dtype == torch.float32 else 2e-2)
    assert_close(lse, want_lse, 1e-5)
    call.k[:] = -math.inf  # a row whose every logit is −inf sees nothing
    out, lse = attend(lowered(call, dtype)[0], "native")
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_head_and_row(isa: str, dtype: torch.dtype) -> None:
    call = random_call(5, (2, 4, 2, 130, 130, 32, 32))
    clean, _ = lowered(call, dtype)
    want = attend(clean, "native")[0]
    for which, head, rows in (("q", 1, slice(77, 78)), ("k", 1, slice(77, None)), ("v", 0, slice(77, None))):
        dirty = Call(clean.q.clone(), clean.k.clone(), clean.v.clone(), None, True, clean.options)
        getattr(dirty, which)[1, head, 77] = math.nan
        heads = [1] if which == "q" else [2 * head, 2 * head + 1]
        out, lse = attend(dirty, "native")
        hit = torch.zeros(2, 4, 130, dtype=torch.bool)
        hit[1, heads, rows] = True
        assert out[hit].isnan().any(-1).all(), which
        if which != "v":
            assert lse[hit].isnan().all()
        if which == "v":  # a hidden key's value enters with weight 0, and 0 · NaN is NaN, in the reference as well
            hit[1, heads] = True
        assert torch.equal(out[~hit], want[~hit]), which


CORRUPT = {
    "a tile past the end": ("kv_indices", lambda t: t.fill_(99), "kv_indices names tiles 99…99; expected 0…2"),
    "a negative tile": ("full_kv_indices", lambda t: t.fill_(-1), "full_kv_indices names tiles -1…-1; expected 0…2"),
    "too many tiles": ("kv_num_blocks", lambda t: t.fill_(7), "kv_num_blocks spans 7…7; expected 0…3"),
    "a negative count": ("full_kv_num_blocks", lambda t: t.fill_(-2), "full_kv_num_blocks spans -2…-2"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt_masks_raise(case: str) -> None:
    name, spoil, message = CORRUPT[case]
    mask = block_mask(torch.tensor([[[[1, 2, 0], [2, 1, 1], [0, 2, 1]]]], dtype=torch.int8), (64, 64), (150, 150))
    spoil(getattr(mask, name))
    call, _ = lowered(random_call(0, (1, 1, 1, 150, 150, 16, 16), mask), torch.float32)
    with pytest.raises(ShapeError, match=message):
        attend(call, "native")


def test_the_compiled_door_checks_every_index_itself() -> None:
    q = torch.zeros(1, 1, 100, 16)
    bounds = [torch.zeros(1, 100, dtype=torch.long), torch.full((1, 100), 100)]
    kinds, table = torch.ones(1, 1, 2, 2, dtype=torch.int8), torch.zeros(3, 64, 1, dtype=torch.long)
    slot = torch.zeros(1, 1, 2, 2, dtype=torch.int32)

    def run(kinds: Tensor, slot: Tensor, table: Tensor, tile: list[int]) -> None:
        ops.attention(q, q, q, *bounds, None, kinds, slot, table, None, None, None, tile, [], 1.0, 0.0, 0)

    run(kinds, slot, table, [64, 64])
    for value in (3, -2):
        wrong = slot.clone()
        wrong[0, 0, 1, 1] = value
        with pytest.raises(ValueError, match="a tile names a row that the table does not have"):
            run(kinds, wrong, table, [64, 64])
    with pytest.raises(ValueError, match="do not cover the rows and keys"):
        run(kinds, slot, table, [32, 64])
    index = torch.full((1, 1, 2, 3), 100)
    with pytest.raises(ValueError, match="a list names a key that does not exist"):
        ops.attention(q, q, q, *bounds, None, None, None, None, index, None, None, [64, 0], [], 1.0, 0.0, 0)
    counts = [2, 100, 100, 0, 0]
    bounds_of = torch.tensor([0, 50, 100])
    fine = [torch.arange(100), bounds_of, torch.arange(100), bounds_of, torch.zeros(2), torch.zeros(2)]
    wrong_parts = {
        "names a row that its head does not have": (0, torch.full((100,), 100)),
        "names a key that does not exist": (2, torch.full((100,), -1)),
        "do not rise": (3, torch.tensor([0, 101, 100])),
        "begin at 0 and end": (1, torch.tensor([0, 50, 99])),
        "names a head": (5, torch.ones(2)),
    }
    for message, (part, value) in wrong_parts.items():
        parts = [value if n == part else x for n, x in enumerate(fine)]
        members = torch.cat([x.long() for x in parts])
        with pytest.raises(ValueError, match=message):
            ops.attention(q, q, q, *bounds, None, None, None, None, None, members, None, [0, 0], counts, 1.0, 0.0, 0)
    with pytest.raises(ValueError, match="another number of heads"):
        run(kinds.expand(1, 3, 2, 2).contiguous(), slot, table, [64, 64])


def test_refusals_name_their_reason() -> None:
    call = random_call(0, (1, 2, 2, 20, 20, 8, 8))
    with pytest.raises(UnsupportedError, match="computes in float32 or lower"):
        attend(call, "native")


# --- torch's machinery -----------------------------------------------------------------------------------------------


def operator_arguments(mask: Layout | None = None, grad: bool = True) -> tuple[Any, ...]:
    call, _ = lowered(random_call(8, (1, 2, 1, 100, 100, 16, 16), mask), torch.float32)
    seen = visible(AttentionCall(call.q, call.k, call.v, mask, call.host.base(), 0.25))
    q, k, v = (t.requires_grad_(grad) for t in (call.q, call.k, call.v))
    return (
        q, k, v, seen.lo, seen.hi, seen.valid, seen.kinds, seen.slot, seen.table, seen.index, seen.members, None,
        list(seen.tile), list(seen.counts), 0.25, 0.0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["dense", "blocks", "lists", "softmax", "mean"])
def test_opcheck(kind: str) -> None:
    make = torch.Generator().manual_seed(0)
    mask: Layout | None = None
    if kind == "blocks":
        mask = random_blocks(make, 1, 2, 100, 100, (32, 32), True)
    elif kind == "lists":
        mask = random_lists(make, 1, 1, 100, 100, 7, 40, False)
    elif kind != "dense":
        mask = random_groups(make, (1, 2, 1, 100, 100), 3, False, kind)
    torch.library.opcheck(ops.attention, operator_arguments(mask))
    q, k, v, *rest = operator_arguments(mask, grad=False)
    out, lse = ops.attention(q, k, v, *rest)
    torch.library.opcheck(ops.attention_backward, (torch.ones_like(out), None, q, k, v, out, lse, *rest, False))


def test_compiled_whole_graph_equals_eager() -> None:
    arguments = operator_arguments()

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ops.attention(2 * q, k, v, *arguments[3:])
        return out.square().sum() + lse.sum()

    grads = [
        torch.autograd.grad(how(*arguments[:3]), arguments[:3])
        for how in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_the_same_gradients(reentrant: bool) -> None:
    call, _ = lowered(random_call(9, (1, 2, 1, 140, 140, 16, 16)), torch.float32)
    leaves = [t.requires_grad_() for t in (call.q, call.k, call.v)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return foveal.attention(q, k, v, SlidingWindow(30, sinks=2), causal=True, softcap=5.0, impl="native")

    plain = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    checkpoint(run, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(leaf.grad, want) for leaf, want in zip(leaves, plain, strict=True))


def test_second_derivatives_raise() -> None:
    call, _ = lowered(random_call(9, (1, 2, 1, 20, 20, 16, 16)), torch.float32)
    q = call.q.requires_grad_()
    (grad,) = torch.autograd.grad(attend(call, "native")[0].square().sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="no second derivative"):
        grad.sum().backward()


def test_gradients_by_differences() -> None:
    call = random_call(10, (1, 2, 1, 9, 11, 4, 3))
    low, exact = lowered(call, torch.float32)
    got = gradients(low, "native")
    for name in ("q", "k", "v"):
        step = 1e-5
        leaf = getattr(exact, name)
        for at in (0, leaf.numel() // 2, leaf.numel() - 1):
            values = []
            for sign in (1, -1):
                leaf.view(-1)[at] += sign * step
                out, lse = attend(exact, "reference")
                make = torch.Generator().manual_seed(9)
                weights = [torch.randn(t.shape, generator=make, dtype=torch.float64) for t in (out, lse)]
                values.append(float((out * weights[0]).sum() + (finite(lse) * weights[1]).sum()))
                leaf.view(-1)[at] -= sign * step
            assert float(got[name].view(-1)[at]) == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-4)
