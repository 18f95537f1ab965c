"""How ``gather`` reads and writes its rows: in place where they follow each other, masks that logits are added to, keys read as runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import foveal
from foveal.core.base_mask import BaseMask
from foveal.core.layouts import BlockMask, KeySelection, block_mask
from foveal.kernels import block_plan, gather, ragged, reference, rows
from foveal.kernels.call import AttentionCall
from foveal.kernels.rows import Batch, Plan, consecutive_rows

from ..support import assert_close

pytestmark = pytest.mark.usefixtures("poison")

SIZE = 16
WHOLE, CUT = 144, 150
"""Lengths of whole tiles, and with keys past the end, which are a condition of their own."""


class Watched:
    """``attend_rows`` that keeps what its batches are made of, and hides from it that rows follow each other when it is told to."""

    def __init__(self, gathered: bool = False) -> None:
        self.gathered = gathered
        self.batches: list[Batch] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Plan, *args: Any) -> tuple[Tensor, Tensor]:
        def batches() -> Iterator[Batch]:
            for batch in plan.batches():
                if batch.run is not None:
                    assert batch.q_rows.flatten().tolist() == list(range(batch.run.start, batch.run.stop))
                self.batches.append(batch)
                yield replace(batch, run=None) if self.gathered else batch

        return ragged.attend_rows(q, k, v, replace(plan, batches=batches), *args)


def mask_of(kind: str, batch: int, heads: int, length: int = WHOLE) -> BlockMask:
    """Tiles of 16 with many cut ones: each hides pairs of its own, or all hide the same; one row of tiles is empty."""
    tiles = -(-length // SIZE)
    make = torch.Generator().manual_seed(heads)
    kinds = torch.randint(0, 4, (batch, heads, tiles, tiles), generator=make).clamp(max=2).to(torch.int8)
    if kind == "own":  # 1 is a cut tile: more of them than whole ones
        kinds[kinds == 2] = (torch.rand(int((kinds == 2).sum()), generator=make) < 0.5).to(torch.int8) + 1
        kinds[:, :, 3:7] = kinds[:, :, 3:4]  # rows of as many tiles that follow each other
        table = torch.rand(length, length, generator=make) < 0.4

        def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return table[i, j]
    else:

        def mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i % SIZE + j % SIZE) % 3 == 0

        kinds[:] = kinds[:1, :1, :1].clone()
    kinds[:, :, 1] = 0  # rows that see nothing
    return block_mask(kinds, (SIZE, SIZE), (length, length), mod)


def inputs(
    batch: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64, length: int = WHOLE
) -> list[Tensor]:
    make = torch.Generator().manual_seed(1)
    sizes = [(batch, h, length, 8) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(*size, generator=make, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def solve(attend: Any, leaves: list[Tensor], layout: Any, **words: Any) -> list[Tensor]:
    """``out``, ``lse`` and gradients of q, k, v and, where there is one, the bias."""
    base = BaseMask.build(leaves[0].shape[2], leaves[1].shape[2], causal=words.pop("causal", False))
    bias = words.get("bias")
    out, lse = attend(AttentionCall(*leaves, layout, base, 0.4, **words))
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = (out.double() * weight).sum() + lse[lse > -torch.inf].double().sum()
    return [out, lse, *torch.autograd.grad(loss, leaves if bias is None else [*leaves, bias])]


@pytest.mark.parametrize("kind", ["own", "alike"])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("each", [False, True], ids=["one mask", "a mask for each"])
@pytest.mark.parametrize("words", [{}, {"softcap": 2.0}, {"causal": True}, {"bias": True}], ids=str)
@pytest.mark.parametrize("budget", [1, 3000])
@pytest.mark.parametrize("length", [WHOLE, CUT])
def test_masks_of_every_kind_give_what_the_reference_gives(
    kind: str,
    heads: tuple[int, int],
    each: bool,
    words: dict[str, Any],
    budget: int,
    length: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watched = Watched()
    monkeypatch.setattr(gather, "CPU_SCORES", budget)
    monkeypatch.setattr(gather, "attend_rows", watched)
    words = dict(words)
    if "bias" in words:
        words["bias"] = torch.randn(heads[0], 2 * length - 1, dtype=torch.float64).requires_grad_()
    layout = mask_of(kind, 2 if each else 1, heads[0] if each else 1, length)
    found = [solve(module.attend, inputs(2, *heads, length=length), layout, **words) for module in (gather, reference)]
    for number, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert_close(ours, theirs, 1e-9, str(number))
    started = [batch for batch in watched.batches if batch.start is not None]
    assert bool(started) == (kind == "own" and not words.get("causal") and length == WHOLE), (
        "one condition cuts most tiles"
    )
    assert any(batch.hide is not None for batch in watched.batches)


@pytest.mark.parametrize("kind", ["own", "alike"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_follow_each_other_are_read_and_written_in_place(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit what gathering them gives."""
    found = []
    for gathered in (False, True):
        watched = Watched(gathered)
        monkeypatch.setattr(gather, "attend_rows", watched)
        monkeypatch.setattr(gather, "CPU_SCORES", 5000)
        found.append(solve(gather.attend, inputs(2, 3, 3, dtype), mask_of(kind, 1, 1)))
        runs = [batch.run for batch in watched.batches if batch.run is not None]
        assert any(run.stop - run.start > 1 for run in runs)
        assert len(runs) < len(watched.batches) or kind == "alike", "both kinds of batches are in this mask"
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("penalties", [0, block_plan.PENALTIES])
def test_single_precision_masks(penalties: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Penalties go straight into the logits' memory where both are float32; bool masks are applied afterwards."""
    monkeypatch.setattr(block_plan, "PENALTIES", penalties)
    layout = mask_of("own", 1, 1)
    ours = solve(gather.attend, inputs(2, 4, 2, torch.float32), layout)
    theirs = solve(reference.attend, inputs(2, 4, 2), layout)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(a.double(), b, 2e-5, str(number))


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("lists", [(1, "one"), (2, "one"), (1, "keys"), (2, "queries")], ids=str)
@pytest.mark.parametrize("run", [1, 4])
@pytest.mark.parametrize("budget", [1, 5000, 1 << 19])
def test_lists_that_are_seen_whole_run_in_the_order_of_their_rows(
    heads: tuple[int, int], lists: tuple[int, str], run: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched()
    monkeypatch.setattr(gather, "CPU_SCORES", budget)
    monkeypatch.setattr(gather, "attend_rows", watched)
    count = {"one": 1, "keys": heads[1], "queries": heads[0]}[lists[1]]
    length, block = 96, 8
    make = torch.Generator().manual_seed(run)
    first = torch.stack([torch.randperm(length // run, generator=make)[:20] for _ in range(lists[0] * count * 12)])
    index = (first[..., None] * run + torch.arange(run)).reshape(lists[0], count, length // block, -1)
    base = BaseMask.build(length, length, causal=False)
    found = []
    for module in (gather, reference):
        q, k, v = inputs(2, *heads, length=length)
        out, lse = module.attend(AttentionCall(q, k, v, KeySelection(index, block), base, 0.4))
        found.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), [q, k, v])])
    for number, (ours, theirs) in enumerate(zip(*found, strict=True)):
        assert_close(ours, theirs, 1e-9, str(number))
    own_lists = heads[0] == heads[1] or lists[1] == "queries"
    assert all((batch.run is not None) == own_lists for batch in watched.batches)


def lists_of(kind: str) -> KeySelection:
    """Lists of 60 keys for 12 blocks of 12 rows: the first 32 keys of every other list come after its rows (a causal model hides them)."""
    make = torch.Generator().manual_seed(7)
    index = torch.stack([torch.randperm(WHOLE - 32, generator=make) for _ in range(24)])[:, :60].view(1, 2, 12, 60)
    index[:, :, ::2, :32] = WHOLE - 1 - torch.arange(32)
    if kind == "short lists":
        index[:, :, 1, 20:] = index[:, :, 3] = -1
    return KeySelection(index, 12)


@pytest.mark.parametrize("kind", ["own", "alike", "evaluated", "lists", "short lists", "dense"])
@pytest.mark.parametrize("large", ["none", "some", "all"])
@pytest.mark.parametrize("words", [{}, {"softcap": 2.0}, {"causal": True}, {"bias": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keys_in_parts_give_what_the_reference_gives(
    kind: str, large: str, words: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``large``: the rows of which the logits are too large to be weighted without their maximum."""
    watched, heads = Watched(), (4, 2)
    monkeypatch.setattr(rows, "KEYS_AT_ONCE", SIZE)
    monkeypatch.setattr(gather, "attend_rows", watched)
    monkeypatch.setattr(gather, "CPU_SCORES", 4000)
    if kind == "evaluated":
        monkeypatch.setattr(block_plan, "TABLE_KEYS", 0)
    layout = (
        None
        if kind == "dense"
        else lists_of(kind)
        if "lists" in kind
        else mask_of("own" if kind == "evaluated" else kind, 1, 1)
    )
    size = torch.ones(WHOLE, 1, dtype=torch.float64)
    size[{"none": slice(0), "some": slice(0, None, 3), "all": slice(None)}[large]] = 100.0
    words, found = dict(words), []
    if "bias" in words:
        words["bias"] = torch.randn(4, 2 * WHOLE - 1, dtype=torch.float64).requires_grad_()
    for module, of in ((gather, dtype), (reference, torch.float64)):
        q, k, v = inputs(2, *heads)
        leaves = [x.detach().to(of).requires_grad_() for x in (q.detach() * size, k, v)]
        found.append(solve(module.attend, leaves, layout, **words))
    for number, (ours, theirs) in enumerate(zip(*found, strict=True)):
        scale = float(theirs[theirs.isfinite()].abs().max())
        assert_close(ours.double(), theirs, (1e-9 if dtype == torch.float64 else 3e-4) * max(1.0, scale), str(number))
    parts = [batch for batch in watched.batches if not (batch.first and batch.last)]
    assert {batch.first for batch in parts} == {batch.last for batch in parts} == {False, True}
    for batch, then in zip(watched.batches, watched.batches[1:], strict=False):
        assert then.first == batch.last and (batch.last or torch.equal(batch.q_rows, then.q_rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_take_their_keys_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a dense call over 4,096 keys are made 1,024 at a time, so that more than two rows of tiles run at once."""
    watched = Watched()
    monkeypatch.setattr(gather, "attend_rows", watched)
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, n, 64, generator=make).to(dtype) for n in (1024, 4096, 4096))
    out = foveal.attention(q, k, v, impl="gather", causal=False)
    assert {batch.k_rows.shape[1] * block_plan.DENSE_BLOCK for batch in watched.batches} == {1024}
    assert {batch.q_rows.shape[0] for batch in watched.batches} == {4, 6}
    exact = foveal.attention(q.double(), k.double(), v.double(), impl="reference", causal=False)
    assert_close(out.double(), exact, 1e-5 if dtype == torch.float32 else 4e-3)


@example([[(0, 4), (1, 4)], [(2, 4), (5, 2), (6, 2)]], 96)
@example([[(0, 16), (1, 16)], [(2, 16), (3, 8), (3, 8)]], 96)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([1, 2, 4, 8, 16])), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from([96, 92, 90, 91]),
)  # fmt: skip
def test_consecutive_rows_are_the_longest_runs_that_all_lists_consist_of(
    lists: list[list[tuple[int, int]]], length: int
) -> None:
    read = [[at * size + i for at, size in runs for i in range(size)] for runs in lists]
    index, sizes = torch.tensor([row for one in read for row in one]), [len(one) for one in read]

    def holds(unit: int) -> bool:
        return length % unit == 0 and all(
            len(one) % unit == 0
            and all(one[i] % unit == 0 and one[i : i + unit] == list(range(one[i], one[i] + unit)) for i in range(0, len(one), unit))
            for one in read
        )  # fmt: skip

    assert consecutive_rows(index, sizes, length) == max(unit for unit in (1, 2, 4, 8, 16) if holds(unit))


@pytest.mark.parametrize(("height", "share"), [(16, 1.0), (64, 1.0), (128, 1.5), (256, 2.0), (1024, 2.0)])
def test_attentions_of_many_rows_run_with_more_scores_at_once(
    height: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ``height`` is the sum of the head dimensions, the keys and values of a batch take as much memory as its scores."""
    given, real = [], block_plan.split_rows
    monkeypatch.setattr(block_plan, "split_rows", lambda *a: given.append(a[2]) or real(*a))
    q = torch.zeros(1, 1, 1024, 64)
    mask = block_mask(torch.ones(1, 1, 1024 // height, 8, dtype=torch.int8), (height, 128), (1024, 1024))
    foveal.attention(q, q, q, mask, impl="gather")
    assert given == [share * gather.CPU_SCORES]
