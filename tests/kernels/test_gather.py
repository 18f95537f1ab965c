"""What is peculiar to ``gather``: torch's own block masks, checkpointing, a single backward, and memory that stays O(N)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

import foveal
from foveal.core.base_mask import FULL, BaseMask
from foveal.core.layouts import Groups, KeySelection, block_mask
from foveal.kernels import block_plan, gather, group_plan, reference, rows
from foveal.kernels import reach as reach_of
from foveal.kernels.call import AttentionCall
from foveal.kernels.group_plan import direct_plan
from foveal.patterns import SlidingWindow

from ..strategies import Call
from ..support import allocated_peak, assert_close, loop

pytestmark = pytest.mark.usefixtures("poison")


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("size", [(16, 16), (64, 32), (128, 128)], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_torch_block_masks_run_unchanged(size: tuple[int, int], per_head: bool) -> None:
    slope = torch.tensor([2, 3, 5, 7])

    def mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q >= k) & ((q - k < 20) | (k % slope[h * int(per_head)] == b))

    mask = create_block_mask(mod, 2, 4 if per_head else None, 150, 170, device="cpu", BLOCK_SIZE=size)
    q, k, v = random(2, 4, 150, 8), random(2, 2, 170, 8, seed=1), random(2, 2, 170, 8, seed=2)
    expected = flex_attention(q, k, v, block_mask=mask, enable_gqa=True)
    assert_close(foveal.attention(q, k, v, mask, impl="gather"), expected, 1e-9, "gather against flex_attention")
    assert_close(foveal.attention(q, k, v, mask, impl="reference"), expected, 1e-9, "reference against flex_attention")
    causal = foveal.attention(q, k, v, mask, causal=True, impl="gather")
    assert_close(causal, loop(q, k, v, mask, Call(q, k, v, mask, True, {}).host)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_whole_tiles_never_ask_the_mask_mod(causal: bool) -> None:
    q, k, v = (random(1, 1, 200, 4, seed=i) for i in range(3))
    mask = block_mask(
        torch.full((1, 1, 2, 2), FULL, dtype=torch.int8), (128, 128), (200, 200), lambda b, h, q, k: q < 0
    )
    dense = foveal.attention(q, k, v, causal=causal, impl="reference")
    for impl in ("gather", "reference"):  # causality and the end of the keys cut three of the four tiles
        assert_close(foveal.attention(q, k, v, mask, causal=causal, impl=impl), dense)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_gives_the_same_gradients(reentrant: bool) -> None:
    q, k, v = (random(1, 2, 200, 8, seed=i).requires_grad_() for i in range(3))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return foveal.attention(q, k, v, SlidingWindow(30, sinks=2), causal=True, softcap=5.0, impl="gather")

    plain = torch.autograd.grad(attend(q, k, v).square().sum(), (q, k, v))
    checkpoint(attend, q, k, v, use_reentrant=reentrant).square().sum().backward()
    for leaf, expected in zip((q, k, v), plain, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, expected)


def test_backward_twice_and_second_derivatives_raise() -> None:
    q, k, v = (random(1, 2, 20, 4, seed=i).requires_grad_() for i in range(3))
    loss = foveal.attention(q, k, v, causal=True, impl="gather").square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    loss = foveal.attention(q, k, v, causal=True, impl="gather").square().sum()
    (grad,) = torch.autograd.grad(loss, q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_training_is_silent() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8).requires_grad_() for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foveal.attention(q, k, v, SlidingWindow(9), causal=True, impl="gather").sum().backward()


def test_only_the_gradients_that_are_asked_for() -> None:
    q, k, v = (random(1, 2, 40, 4, seed=i) for i in range(3))
    whole = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(foveal.attention(*whole, causal=True, impl="gather").sum(), whole)
    for n in range(3):
        some = [t.clone().requires_grad_(i == n) for i, t in enumerate((q, k, v))]
        foveal.attention(*some, causal=True, impl="gather").sum().backward()
        assert torch.equal(some[n].grad, expected[n])


@pytest.mark.parametrize("mask", [None, SlidingWindow(256, sinks=4)], ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
def test_peak_memory_is_below_ten_times_the_inputs(mask: SlidingWindow | None, backward: bool) -> None:
    length, heads = 4096, 2
    q, k, v = (torch.randn(1, heads, length, 64, requires_grad=backward) for _ in range(3))
    out = torch.empty(0)

    def work() -> None:
        nonlocal out
        out = foveal.attention(q, k, v, mask, causal=True, impl="gather")
        if backward:
            out.sum().backward()

    peak = allocated_peak(work)
    inputs, scores = 3 * q.numel() * 4, heads * length**2 * 4
    assert peak >= out.numel() * 4, "the profiler saw no allocation"
    assert peak <= 10 * inputs, f"peak {peak / 1e6:.0f} MB for {inputs / 1e6:.0f} MB of q, k and v"
    assert peak < scores / 2


@pytest.mark.parametrize("demand", ["causal", "window", "padding", "all"])
@pytest.mark.parametrize("empty", [None, 0, 2])
@pytest.mark.parametrize("budget", [1, 9000, gather.CPU_SCORES])
@pytest.mark.parametrize("lists", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_lists_in_order_are_masked_from_the_first_cut_key_on(
    monkeypatch: pytest.MonkeyPatch, demand: str, empty: int | None, budget: int, lists: int, biased: bool
) -> None:
    """Keys that every row sees come first, cut ones and pads last; where a block has no list at all, its rows are zero."""
    valid = torch.arange(96)[None] != torch.tensor([[40], [7]])
    base = {
        "causal": lambda: BaseMask.build(96, 96, causal=True),
        "window": lambda: BaseMask.build(96, 96, causal=True, window=50),
        "padding": lambda: BaseMask.build(96, 96, causal=False, valid=valid),
        "all": lambda: BaseMask.build(96, 96, causal=False),
    }[demand]()
    monkeypatch.setattr(gather, "CPU_SCORES", budget)
    index = torch.arange(96).repeat(1, 2, 6, 1)
    index[
        index >= (16 * torch.arange(6) + torch.tensor([[9], [16]]))[None, :, :, None]
    ] = -1  # 9 or 16 keys of their own
    if empty is not None:
        index[:, :, empty] = -1
    index = index[:, :lists]
    bias = random(2, 2 * 96 - 1, seed=3) if biased else None
    found = []
    for module in (gather, reference):
        q, k, v = (random(2, 2, 96, 8, seed=i).requires_grad_() for i in range(3))
        out, lse = module.attend(AttentionCall(q, k, v, KeySelection(index, 16), base, 0.4, bias=bias))
        seen = lse[lse > -torch.inf].sum()
        found.append([out, lse, *torch.autograd.grad(out.square().sum() + seen, [q, k, v])])
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), *found, strict=True):
        assert_close(a, b, 1e-9, name)


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("run", [1, 4])
def test_disjoint_groups_are_read_where_they_are(per_head: bool, run: int) -> None:
    batch, heads, kv_heads, length = 2, 4, 2, 48
    owners = batch * heads if per_head else batch
    q_all, k_all = [], []
    make = torch.Generator().manual_seed(run)
    for owner in range(owners):
        order = torch.randperm(length // run, generator=make)[:, None] * run + torch.arange(run)
        q_all += [owner * length + part.reshape(-1) for part in order.split([4 // run, 8 // run, 36 // run])[:2]]
        base = owner // (heads // kv_heads) if per_head else owner
        for count in (8, 20):
            rows = torch.randperm(length // run, generator=make)[: count // run, None] * run + torch.arange(run)
            k_all.append(base * length + rows.reshape(-1))
    ends = [torch.tensor([0, *(part.numel() for part in parts)]).cumsum(0) for parts in (q_all, k_all)]
    groups = Groups(torch.cat(q_all), ends[0], torch.cat(k_all), ends[1], per_head)
    q, k, v = (
        torch.randn(batch, h, length, 6, dtype=torch.float64).requires_grad_() for h in (heads, kv_heads, kv_heads)
    )
    base_mask = BaseMask.build(length, length, causal=False)
    plan = direct_plan(AttentionCall(q, k, v, groups, base_mask, 1.0), groups, 1 << 12)
    assert plan is not None and (plan.q_unit, plan.k_unit) == (run, run)
    out, expected = (foveal.attention(q, k, v, groups, impl=impl) for impl in ("gather", "reference"))
    assert_close(out, expected)
    assert int((out == 0).all(-1).sum()) == batch * heads * (length - 12), "queries of no group see nothing"
    weight = torch.randn(out.shape, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (out, expected)), strict=True):
        assert_close(a, b)
    assert (
        direct_plan(AttentionCall(q, k, v, groups, BaseMask.build(length, length, causal=True), 1.0), groups, 99)
        is None
    )


@pytest.mark.parametrize("limit", [{}, {"TABLE_KEYS": 0}, {"PENALTIES": 0}], ids=str)
@pytest.mark.parametrize("host", ["causal", "window", "packed", "padded", "predicate"])
@pytest.mark.parametrize("blocks", [False, True])
def test_cut_tiles_are_the_same_from_tables_and_one_by_one(
    monkeypatch: pytest.MonkeyPatch, limit: dict[str, int], host: str, blocks: bool
) -> None:
    """Two sequences of 300 tokens, whose intervals differ when they are packed."""
    for name, value in limit.items():
        monkeypatch.setattr(block_plan, name, value)
    place = torch.arange(300)
    words: dict[str, Any] = {
        "causal": {},
        "window": {"window": 40},
        "packed": {"segments": (place >= torch.tensor([[0, 70, 200], [0, 131, 132]])[..., None]).sum(1) - 1},
        "padded": {"valid": place >= torch.tensor([[0], [129]])},
        "predicate": {"predicate": lambda b, h, q, k: (q + k + h) % 3 != b},
    }[host]
    base = BaseMask.build(300, 300, causal=True, **words)
    q, k, v = (random(2, h, 300, 5, seed=h) for h in (4, 2, 2))
    mask = create_block_mask(
        lambda b, h, q, k: (q - k < 30) | (k < 2), None, None, 300, 300, device="cpu", BLOCK_SIZE=64
    )
    call = AttentionCall(q, k, v, mask if blocks else None, base, 0.4)
    for ours, theirs in zip(gather.attend(call), reference.attend(call), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("combine", ["softmax", "mean"])
@pytest.mark.parametrize(("slots", "small"), [(1, 1 << 18), (1 << 18, 1 << 18), (1 << 18, 0)])
def test_large_groups_are_cut_to_the_budget(
    monkeypatch: pytest.MonkeyPatch, combine: Any, slots: int, small: int
) -> None:
    """Groups of up to 300 queries in pieces of 64, and queries in several pieces of one batch: as the reference."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 300, 5, generator=make, dtype=torch.float64) for h in (4, 2, 2))
    sets = [(torch.arange(300), 7), (torch.arange(0, 300, 2), 50), (torch.arange(130), 50), (torch.tensor([299]), 300)]
    q_index = torch.cat([rows for rows, _ in sets])
    k_index = torch.cat([torch.randperm(300, generator=make)[:n] for _, n in sets])
    cu_q = torch.tensor([0, *(len(rows) for rows, _ in sets)]).cumsum(0)
    cu_k = torch.tensor([0, *(n for _, n in sets)]).cumsum(0)
    layout = Groups(q_index, cu_q, k_index, cu_k, combine=combine)
    weight = torch.randn(q.shape, generator=make, dtype=torch.float64)

    def solve(impl: str) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out, lse = foveal.attention(*leaves, layout, causal=True, impl=impl, return_lse=True)
        seen = lse > -torch.inf
        loss = (out * weight).sum() + lse[seen].sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]

    want = solve("reference")
    monkeypatch.setattr(gather, "CPU_SCORES", 64)
    monkeypatch.setattr(group_plan, "SLOTS", slots)
    monkeypatch.setattr(group_plan, "SMALL_BUCKET", small)
    for a, b in zip(solve("gather"), want, strict=True):
        assert_close(a, b)


def test_shapes_of_little_work_are_padded_to_the_next_one_of_as_many_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_plan, "SMALL_BUCKET", 1000)
    shapes = [[4, 8, 3], [16, 8, 1], [600, 8, 2], [700, 8, 1], [4, 16, 5]]
    assert list(group_plan._joined(shapes)) == [(16, 8, 4), (600, 8, 2), (700, 8, 1), (4, 16, 5)]
    monkeypatch.setattr(group_plan, "SMALL_BUCKET", 0)
    assert [list(shape) for shape in group_plan._joined(shapes)] == shapes


def everything(batch: int, heads: int, length: int) -> dict[str, Any]:
    """Layouts that keep every pair, one for each kind of plan; ``groups`` has each query in two groups of other keys."""
    keys, own = torch.arange(length), torch.arange(batch * heads * length)
    halves, wholes = torch.arange(2 * batch * heads + 1) * (length // 2), torch.arange(batch * heads + 1) * length
    twice = own.view(-1, 1, length).expand(-1, 2, -1).reshape(-1)
    return {
        "blocks": block_mask(torch.full((1, 1, 2, 2), FULL, dtype=torch.int8), (length // 2,) * 2, (length, length)),
        "lists": KeySelection(keys.expand(1, 1, 2, -1), block_size=length // 2),
        "groups": Groups(twice, 2 * halves, own, halves, per_head=True),
        "disjoint groups": Groups(own, wholes, own, wholes, per_head=True),
    }


@pytest.mark.parametrize("layout", list(everything(1, 1, 2)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("reach", [1.0, 63.9, 64.1, 2000.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_logits_are_shifted_and_small_ones_need_not_be(
    layout: str, dtype: torch.dtype, reach: float, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All logits of a row may lie near ±``reach`` in base 2: weights must neither overflow nor vanish, with or without the maximum."""
    asked: list[Any] = []
    monkeypatch.setattr(gather, "unshifted_rows", lambda *a: asked.append(reach_of.unshifted_rows(*a)) or asked[-1])
    batch, heads, length, dim = 2, 3, 64, 8
    unit = torch.nn.functional.normalize(random(dim), dim=0)
    near = torch.nn.functional.normalize(unit + 0.01 * random(2, batch, heads, length, dim, seed=1), dim=-1)
    q, k, v = sign * near[0], near[1], random(batch, heads, length, dim, seed=2)
    q = q * (reach / rows.LOG2_E)
    q, k, v = (x.to(dtype).requires_grad_() for x in (q, k, v))
    chosen, weight = everything(batch, heads, length)[layout], random(batch, heads, length, dim, seed=3)
    found = []
    for impl in ("gather", "reference"):
        leaves = [x.detach().to(dtype if impl == "gather" else torch.float64).requires_grad_() for x in (q, k, v)]
        out, lse = foveal.attention(
            *leaves, chosen if impl == "gather" else None, scale=1.0, return_lse=True, impl=impl
        )
        loss = (out.double() * weight).sum() + lse.double().sum()
        found.append((out, lse, *torch.autograd.grad(loss, leaves)))
    (plain,) = asked
    assert plain is True if reach <= reach_of.UNSHIFTED else not plain.any()
    exact = 1e-9 if dtype == torch.float64 else 3e-6 * max(reach, 10.0)
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours.double(), theirs.double(), exact * max(1.0, float(theirs.detach().abs().max())))


def test_values_too_large_for_unshifted_weights_are_shifted() -> None:
    k, v = (random(1, 2, 64, 8, seed=i).float() for i in range(2))
    k = torch.nn.functional.normalize(k, dim=-1)
    q = 60 / rows.LOG2_E * k  # every row sees one key with a weight of 2^60
    exact = foveal.attention(q, k, v, scale=1.0, impl="reference")
    for size in (1.0, 1e36):
        out = foveal.attention(q, k, size * v, everything(1, 2, 64)["blocks"], scale=1.0, impl="gather")
        assert_close((out / size).double(), exact.double(), 1e-4)


@pytest.mark.parametrize("layout", list(everything(1, 1, 2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_rounded_the_same_whatever_is_hidden_from_it(layout: str, dtype: torch.dtype) -> None:
    """Later rows and keys become so large that they need their maximum; no bit of an earlier row changes."""
    chosen = everything(2, 3, 64)[layout]
    q, k, v = (random(2, 3, 64, 8, seed=i).to(dtype) for i in range(3))
    found = []
    for large in (1.0, 1e4):
        factor = torch.ones(64, 1, dtype=dtype)
        factor[40:] = large
        call = [x * factor for x in (q, k, v * factor)]
        out, lse = foveal.attention(*call, chosen, causal=True, impl="gather", return_lse=True)
        assert out.isfinite().all() and lse.isfinite().all()
        found.append((out[:, :, :40], lse[:, :, :40]))
    for small, large in zip(*found, strict=True):
        assert torch.equal(small, large)
