"""What is made for a mask or a static pattern is made once, never for other lengths, and dies with the mask."""

from __future__ import annotations

import contextlib
import functools
import gc
import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

import foveal
from foveal.core.base_mask import FULL, BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext
from foveal.core.layouts import KeySelection, block_mask
from foveal.kernels import block_plan, native, prepared
from foveal.patterns import BlockTopK, Disc, Neighborhood, SlidingWindow
from tests.support import assert_close

IMPLS = ["gather", *(["native"] if native.unavailable() is None else [])]


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    prepared._static.clear()


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def made(impl: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for every time that a kernel prepared a mask."""
    found: list[Any] = []
    if impl == "gather":
        real = block_plan._tiles
        monkeypatch.setattr(block_plan, "_tiles", lambda *a: found.append(1) or real(*a))
    else:
        from foveal.kernels.native import plan

        before = plan._visible
        monkeypatch.setattr(plan, "_visible", lambda *a: found.append(1) or before(*a))
    return found


def tensors(length: int = 256, heads: int = 2, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, batch, heads, length, 16, generator=torch.Generator().manual_seed(length)).unbind()
    return q, k, v


def layout(pattern: Any, length: int = 256, causal: bool = False) -> Any:
    q, k, _ = tensors(length)
    return pattern.select(q, k, SelectContext(BaseMask.build(length, length, causal=causal)))[0]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Tensor:
    return foveal.attention(q.double(), k.double(), v.double(), mask, impl="reference", **options)


def test_layers_and_calls_share_what_was_made(impl: str, made: list[Any]) -> None:
    q, k, v = tensors()
    mask = layout(Disc(3, (16, 16)))
    for _ in range(3):
        assert_close(foveal.attention(q, k, v, mask, impl=impl), exact(q, k, v, mask), 1e-5)
    assert len(made) == 1
    other = layout(Disc(4, (16, 16)))
    assert_close(foveal.attention(q, k, v, other, impl=impl), exact(q, k, v, other), 1e-5)
    assert len(made) == 2


def test_other_surroundings_are_prepared_for_themselves(impl: str, made: list[Any]) -> None:
    mask = layout(SlidingWindow(64, 2, block=32), causal=True)
    for count, (batch, heads, causal) in enumerate([(1, 2, True), (1, 2, False), (2, 2, True), (1, 4, True)], 1):
        q, k, v = tensors(heads=heads, batch=batch)
        for _ in range(2):
            got = foveal.attention(q, k, v, mask, causal=causal, impl=impl)
            assert_close(got, exact(q, k, v, mask, causal=causal), 1e-5)
        assert len(made) == count


def test_a_mask_takes_what_was_made_with_it(impl: str, made: list[Any]) -> None:
    q, k, v = tensors()
    mask = layout(Disc(3, (16, 16)))
    foveal.attention(q, k, v, mask, impl=impl)
    gone, before = weakref.ref(mask), len(prepared._kept)
    del mask
    gc.collect()
    assert gone() is None and len(prepared._kept) == before - 1


def test_a_condition_of_the_users_own_may_change(impl: str, made: list[Any]) -> None:
    """Its tensors are not foveal's to trust: it is asked in every call."""
    q, k, v = tensors()
    offset = torch.tensor(100)
    mask = create_block_mask(lambda b, h, i, j: j <= i + offset - 100, None, None, 256, 256, device="cpu")
    first = foveal.attention(q, k, v, mask, impl=impl)
    offset.fill_(60)
    second = foveal.attention(q, k, v, mask, impl=impl)
    assert len(made) == 2 and not torch.equal(first, second)
    assert_close(second, exact(q, k, v, mask), 1e-5)


def test_lists_that_changed_are_read_again(impl: str, made: list[Any]) -> None:
    q, k, v = tensors()
    kinds = torch.zeros(1, 1, 4, 4, dtype=torch.int8)
    kinds[..., 0] = FULL
    mask = block_mask(kinds, (64, 64), (256, 256))
    foveal.attention(q, k, v, mask, impl=impl)
    other = block_mask(kinds.flip(-1), (64, 64), (256, 256))
    assert mask.full_kv_indices is not None and other.full_kv_indices is not None
    mask.full_kv_indices = other.full_kv_indices.clone()
    assert_close(foveal.attention(q, k, v, mask, impl=impl), exact(q, k, v, other), 1e-5)
    third = block_mask(kinds.roll(1, -1), (64, 64), (256, 256))
    assert third.full_kv_indices is not None
    mask.full_kv_indices.copy_(third.full_kv_indices)
    assert_close(foveal.attention(q, k, v, mask, impl=impl), exact(q, k, v, third), 1e-5)
    assert len(made) == 3 and len(prepared._kept[mask]) == 1


def test_few_preparations_of_a_mask_are_kept(impl: str, made: list[Any]) -> None:
    mask = layout(Disc(3, (16, 16)))
    for heads in range(1, 8):
        foveal.attention(*tensors(heads=heads), mask, impl=impl)
    assert len(prepared._kept[mask]) == prepared.MOST


def test_conditions_without_a_module(impl: str, made: list[Any]) -> None:
    space: dict[str, Any] = {}
    exec("def seen(b, h, q, k): return q >= k", space)
    mask = create_block_mask(space["seen"], None, None, 256, 256, device="cpu")
    q, k, v = tensors()
    for _ in range(2):
        assert_close(foveal.attention(q, k, v, mask, impl=impl), exact(q, k, v, mask), 1e-5)
    assert len(made) == 2


def test_a_wrapper_is_not_taken_for_what_it_wraps(impl: str, made: list[Any]) -> None:
    mask, (q, k, v) = layout(Disc(3, (16, 16))), tensors()
    inner, ahead = mask.mask_mod, torch.tensor(0)

    @functools.wraps(inner)
    def wrapper(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return inner(b, h, i, j) & (j >= ahead)

    mask.mask_mod = wrapper
    first = foveal.attention(q, k, v, mask, impl=impl)
    ahead.fill_(100)
    assert not torch.equal(first, foveal.attention(q, k, v, mask, impl=impl)) and len(made) == 2


def every(n: int, q: Tensor, k: Tensor) -> tuple[KeySelection, None]:
    return KeySelection(torch.arange(0, k.shape[2], n)[None, None, None], q.shape[2]), None


class Changing:
    """Every n-th key, by an object of somebody's own."""

    static = True

    def __init__(self, n: int) -> None:
        self.n = n

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: Any) -> tuple[KeySelection, None]:
        return every(self.n, q, k)


@dataclass(frozen=True)
class Listed:
    """The same with a list among its fields."""

    of: list[int]
    static: ClassVar[bool] = True

    def select(self, q: Tensor, k: Tensor, ctx: SelectContext, state: Any) -> tuple[KeySelection, None]:
        return every(self.of[0], q, k)


@pytest.mark.parametrize("pattern", [Changing(2), Listed([2])], ids=["object", "list"])
def test_what_may_change_or_has_no_value_is_asked_in_every_call(pattern: Any) -> None:
    q, k, v = tensors()
    for n in (2, 3):
        if isinstance(pattern, Listed):
            pattern.of[0] = n
        else:
            pattern.n = n
        assert_close(foveal.attention(q, k, v, pattern), exact(q, k, v, every(n, q, k)[0]), 1e-5)
    assert not prepared._static


def test_threads_share_what_is_kept() -> None:
    pattern, wrong = SlidingWindow(3), []

    def work() -> None:
        try:
            for n in range(2, 60):
                q, k, v = tensors(n, heads=1)
                foveal.attention(q[:, :, -1:], k, v, pattern, causal=True)
        except BaseException as error:
            wrong.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert not wrong and len(prepared._static) <= prepared.MOST_STATIC


def test_fake_tensors_leave_nothing_behind(impl: str) -> None:
    q, k, v = tensors()
    pattern = SlidingWindow(64, 2, block=32)
    with FakeTensorMode(allow_non_fake_inputs=True), contextlib.suppress(Exception):
        foveal.attention(q, k, v, pattern, impl="gather")
    assert_close(foveal.attention(q, k, v, pattern, impl=impl), exact(q, k, v, pattern), 1e-5)


def test_another_default_device(impl: str) -> None:
    q, k, v = tensors()
    mask = layout(Disc(3, (16, 16)))
    if impl == "native":
        with torch.device("meta"):
            got = foveal.attention(q, k, v, mask, impl=impl)
        assert_close(got, exact(q, k, v, mask), 1e-5)


@pytest.mark.parametrize("shared", ["pattern", "mask"])
def test_what_is_made_in_inference_mode_is_not_used_for_training(impl: str, made: list[Any], shared: str) -> None:
    q, k, v = tensors()
    what = Disc(3, (16, 16)) if shared == "pattern" else layout(Disc(3, (16, 16)))
    with torch.inference_mode():
        foveal.attention(q, k, v, what, impl=impl)
    q.requires_grad_()
    foveal.attention(q, k, v, what, impl=impl).sum().backward()
    assert q.grad is not None and len(made) == 2


def test_a_static_pattern_is_asked_once_for_every_size(
    impl: str, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = Disc.select

    def select(self: Disc, q: Tensor, *rest: Any) -> Any:
        asked.append(q.shape[2])
        return real(self, q, *rest)

    monkeypatch.setattr(Disc, "select", select)
    for length, grid in ((256, (16, 16)), (64, (8, 8)), (256, (16, 16))):
        q, k, v = tensors(length)
        for pattern in (Disc(3, grid), Disc(3, grid)):  # equal patterns are one
            assert_close(foveal.attention(q, k, v, pattern, impl=impl), exact(q, k, v, pattern), 1e-5)
    assert asked == [256, 64] and len(made) == 2
    monkeypatch.setattr(prepared, "MOST_STATIC", 1)
    foveal.attention(*tensors(64), Disc(2, (8, 8)), impl=impl)
    assert len(prepared._static) == 1, "the oldest are forgotten"


def test_patterns_that_read_content_are_asked_in_every_call(impl: str, made: list[Any]) -> None:
    pattern = BlockTopK(Budget(tokens=64), kv_block=16, q_block=16)
    q, k, v = tensors()
    foveal.attention(q, k, v, pattern, causal=True, impl=impl)
    foveal.attention(-q, k, v, pattern, causal=True, impl=impl)
    assert len(made) == 2 and not prepared._static


@pytest.mark.parametrize("window", [3, 5])
def test_groups_depend_on_the_batch(window: int) -> None:
    pattern = Neighborhood((8, 8), window, stride=3)
    for batch in (1, 2):
        q, k, v = tensors(64, batch=batch)
        assert_close(foveal.attention(q, k, v, pattern), exact(q, k, v, pattern), 1e-5)
