"""Every promise that a pattern and an implementation make, for every row of ``tests/matrix.py``."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveal import patterns
from foveal.core import density
from foveal.core.errors import UnsupportedError
from foveal.core.layouts import BlockMask, KeySelection, Layout
from foveal.kernels import flex
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import refusals
from foveal.kernels.reference import visible_pairs
from foveal.patterns import Pattern

from ..matrix import HOSTS, PATTERNS, Row, names_with_rows
from ..support import Host, assert_close, context, loop, run, tensors

CASES = [(row, host) for row in PATTERNS for host in HOSTS if host not in PATTERNS[row].refuses]
rows = pytest.mark.parametrize("row", PATTERNS.values(), ids=PATTERNS)
cases = pytest.mark.parametrize(("row", "host"), CASES, ids=[f"{r}/{h}" for r, h in CASES])


def select(
    row: Row, pattern: Pattern, q: Tensor, k: Tensor, host: Host, state: Any = None
) -> tuple[Layout | None, Any]:
    extra = row.extra(q, k, host) if row.extra else {}
    return pattern.select(q, k, context(host, **extra), state)


def attend(
    row: Row, q: Tensor, k: Tensor, v: Tensor, host: Host, pattern: Pattern | None = None, impl: str = "gather"
) -> Tensor:
    layout, _ = select(row, pattern or row.pattern, q, k, host)
    return run(q, k, v, layout, host, impl)[0]


@functools.cache
def solved(row: str, host: str) -> tuple[Any, ...]:
    """Tensors, layout, and the loop's out, lse and visible pairs; shared by the tests of one case."""
    q, k, v = tensors(HOSTS[host], seed=len(host))
    layout, _ = select(PATTERNS[row], PATTERNS[row].pattern, q, k, HOSTS[host])
    return q, k, v, layout, *loop(q, k, v, layout, HOSTS[host])


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Dense attention under a boolean mask, by torch."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return torch.where(seen.any(-1, keepdim=True), out, 0.0)


ELSEWHERE = {"flux"}
"""Patterns that no row can hold: what flux decided at the prompt cannot be rebuilt from keys (``test_flux.py``)."""


def test_every_registered_pattern_has_a_row() -> None:
    missing = set(patterns.names()) - names_with_rows() - ELSEWHERE
    assert not missing, f"add rows for {sorted(missing)} to tests/matrix.py"


@cases
def test_gather_equals_the_loop_and_dense_attention(row: str, host: str) -> None:
    q, k, v, layout, out, lse, seen = solved(row, host)
    got, got_lse = run(q, k, v, layout, HOSTS[host])
    assert_close(got, out, what="gather's out against the loop")
    assert got_lse is not None
    assert_close(got_lse, lse, what="gather's lse against the loop")
    assert_close(got, masked(q, k, v, seen > 0), what="gather's out against torch under the equivalent mask")


@cases
def test_reference_layout_and_density_are_the_definition(row: str, host: str) -> None:
    q, k, v, layout, out, lse, seen = solved(row, host)
    got, got_lse = run(q, k, v, layout, HOSTS[host], "reference")
    assert_close(got, out, what="reference's out")
    assert got_lse is not None
    assert_close(got_lse, lse, what="reference's lse")
    base = HOSTS[host].base()
    assert torch.equal(visible_pairs(AttentionCall(q, k, v, layout, base, 1.0)), seen > 0)
    measured = density.measure(layout, base, q.shape[0], q.shape[1], k.shape[1])
    assert measured.pairs == int(seen.sum())
    assert measured.allowed == int(HOSTS[host].dense().sum()) * q.shape[1]
    assert 0 <= measured.density <= 1
    assert 0 <= measured.tile_density <= 1
    keeps, i, j = PATTERNS[row].keeps, np.arange(base.q_len)[:, None], np.arange(base.kv_len)[None]
    for b in range(q.shape[0] if keeps else 0):
        want = HOSTS[host].allows(b, i, j) & keeps(HOSTS[host], b, i, j)
        assert np.array_equal(seen[b, 0] > 0, want), f"batch row {b}: the layout is not what the definition says"


@cases
def test_gradients_equal_dense_attention(row: str, host: str) -> None:
    q, k, v, layout, _, _, seen = solved(row, host)
    weight = torch.randn(*q.shape[:3], v.shape[-1], generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    expected = torch.autograd.grad(
        (masked(*(ours := [t.clone().requires_grad_() for t in (q, k, v)]), seen > 0) * weight).sum(), ours
    )
    theirs = [t.clone().requires_grad_() for t in (q, k, v)]
    got = torch.autograd.grad((run(*theirs, layout, HOSTS[host])[0] * weight).sum(), theirs)
    for name, a, b in zip("qkv", got, expected, strict=True):
        assert_close(a, b, what=f"gradient of {name}")


@cases
def test_native_equals_the_loop_or_says_why_not(row: str, host: str) -> None:
    q, k, v, layout, out, lse, _ = solved(row, host)
    q, k, v = (t.float() for t in (q, k, v))
    reasons = refusals("native", AttentionCall(q, k, v, layout, HOSTS[host].base(), 1.0))
    if reasons:
        with pytest.raises(UnsupportedError, match=re.escape(reasons[0])):
            run(q, k, v, layout, HOSTS[host], "native")
        return
    got, got_lse = run(q, k, v, layout, HOSTS[host], "native")
    assert_close(got, out, 1e-5, "native's out against the loop")
    assert got_lse is not None
    assert_close(got_lse, lse, 1e-5, "native's lse against the loop")


@rows
@pytest.mark.parametrize("host", ["causal-257", "bidirectional", "decode, left padding", "documents", "right padding"])
def test_full_budget_is_dense(row: Row, host: str) -> None:
    if host in row.refuses:
        return
    q, k, v = tensors(HOSTS[host], seed=2)
    assert_close(attend(row, q, k, v, HOSTS[host], row.full), run(q, k, v, None, HOSTS[host], "reference")[0])


@pytest.mark.parametrize(
    ("row", "host"),
    [(r, h) for r in PATTERNS for h in sorted(PATTERNS[r].refuses)] or [pytest.param("", "", id="none")],
)
def test_refused_hosts_are_refused_by_name(row: str, host: str) -> None:
    if row:
        with pytest.raises(UnsupportedError, match=PATTERNS[row].pattern.registered_name):
            select(PATTERNS[row], PATTERNS[row].pattern, *tensors(HOSTS[host])[:2], HOSTS[host])


@rows
def test_first_and_last_query(row: Row) -> None:
    host = Host(150, 150, pads=((0, 0), (11, 0)))
    q, k, v = tensors(host)
    out = attend(row, q, k, v, host)
    for b, start in ((0, 0), (1, 11)):
        assert_close(
            out[b, :, start], v[b, :, start].repeat_interleave(2, 0), what="the first real query sees only itself"
        )
    assert (out[1, :, :11] == 0).all(), "a query that sees nothing gives zeros"
    *_, seen = loop(q, k, v, select(row, row.pattern, q, k, host)[0], host)
    assert (seen[:, :, -1, -1] > 0).all(), "the last query sees itself"


@rows
def test_batch_of_one_equals_batch_of_many(row: Row) -> None:
    host = Host(140, 140, pads=((0, 0), (70, 0), (3, 0)))
    q, k, v = tensors(host)
    out = attend(row, q, k, v, host)
    for b in range(3):
        alone = attend(row, q[b : b + 1], k[b : b + 1], v[b : b + 1], host.alone(b))
        assert_close(alone, out[b : b + 1], 1e-12, f"batch row {b}")


@rows
def test_grouped_heads_equal_repeated_keys(row: Row) -> None:
    host = HOSTS["causal-129"]
    q, k, v = tensors(host, heads=6, kv_heads=3)
    layout, _ = select(row, row.pattern, q, k, host)
    out = run(q, k, v, layout, host)[0]
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    if row.per_group:
        assert isinstance(layout, KeySelection) and layout.index.shape[1] == 3
        layout = KeySelection(layout.index.repeat_interleave(2, 1), layout.block_size)
    elif not isinstance(layout, (BlockMask, type(None))):
        layout, _ = select(row, row.pattern, q, k, host)
    assert_close(run(q, k, v, layout, host)[0], out)


@rows
def test_non_contiguous_inputs(row: Row) -> None:
    host = HOSTS["causal-129"]
    q, k, v = tensors(host, kv_heads=4)
    k[:, 1:], v[:, 1:] = k[:, :1], v[:, :1]
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k[:, :1], v[:, :1])]
    out = attend(row, strided[0], *(t.expand(-1, 4, -1, -1) for t in strided[1:]), host)
    assert_close(out, attend(row, q, k, v, host), 1e-12)


def pieces(row: Row, host: Host, ends: list[int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Feed a prompt piece by piece, carrying state; each piece must also follow from a state that was lost."""
    outs, state, first = [], None, 0
    for last in ends:
        part = host.cut(first, last)
        now, keys, values = q[:, :, first:last], k[:, :, :last], v[:, :, :last]
        rebuilt, _ = select(row, row.pattern, now, keys, part, None)
        layout, state = select(row, row.pattern, now, keys, part, state)
        out = run(now, keys, values, layout, part)[0]
        assert_close(
            run(now, keys, values, rebuilt, part)[0],
            out,
            1e-12,
            f"rows {first}–{last}: state rebuilt against state carried",
        )
        outs.append(out)
        first = last
    return torch.cat(outs, 2)


@rows
def test_prefill_then_decode_equals_one_pass(row: Row) -> None:
    host = Host(140, 140, pads=((0, 0), (9, 0)))
    q, k, v = tensors(host, seed=3)
    out = pieces(row, host, [133, *range(134, 141)], q, k, v)
    if row.pattern.look_ahead == "none":
        assert_close(out, attend(row, q, k, v, host), 1e-12)


@rows
def test_segments_equal_one_pass(row: Row) -> None:
    step = row.block * math.ceil(40 / row.block)
    host = Host(3 * step + 7, 3 * step + 7, pads=((0, 0), (9, 0)))
    q, k, v = tensors(host, seed=4)
    out = pieces(row, host, [step, 2 * step, 3 * step, host.q_len], q, k, v)
    if row.pattern.look_ahead != "prefill":
        assert_close(out, attend(row, q, k, v, host), 1e-12)


@rows
def test_no_row_reads_later_tokens_than_declared(row: Row) -> None:
    length, cut = 200, 141
    host = Host(length, length)
    bound = {"none": cut, "block": cut // row.block * row.block, "prefill": 0}[row.pattern.look_ahead]
    leaked = False
    for seed in range(4):
        q, k, v = tensors(host, seed=seed)
        out = attend(row, q, k, v, host)
        changed = [
            torch.cat([t[:, :, :cut], 3 * o[:, :, cut:]], 2)
            for t, o in zip((q, k, v), tensors(host, seed=seed + 50), strict=True)
        ]
        future = attend(row, *changed, host)
        without = attend(row, *(t[:, :, :cut] for t in (q, k, v)), Host(cut, cut))
        for name, other in (("changed", future), ("absent", without)):
            assert_close(
                other[:, :, :bound],
                out[:, :, :bound],
                1e-12,
                f"rows before {bound} when tokens from {cut} on are {name}",
            )
            leaked |= not torch.allclose(other[:, :, bound:cut], out[:, :, bound:cut], atol=1e-9)
    assert leaked == (row.pattern.look_ahead != "none"), "look_ahead is declared, but no row reads ahead"


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention as one writes it down first, every step in the inputs' dtype: sets the error budget."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v


def within_budget(got: Tensor, naive: Tensor, exact: Tensor, dtype: torch.dtype, size: float, what: str) -> None:
    """At most twice the error of plain attention in this dtype, plus four roundings of terms of ``size``.

    Gradients of keys and values are sums over all rows of a group, whose error depends on the order: eight roundings there.
    """
    roundings = 8 if what.endswith(("gradient of k", "gradient of v")) else 4
    budget = 2 * float((naive.double() - exact).abs().max()) + roundings * torch.finfo(dtype).eps * size
    error = float((got.double() - exact).abs().max())
    assert error <= budget, f"{what}: error {error:.3g} is above the budget {budget:.3g}"


@rows
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["gather", "sdpa", "native"])
def test_low_precision_stays_in_its_error_budget(row: Row, dtype: torch.dtype, impl: str) -> None:
    host = HOSTS["causal-129"]
    low = tensors(host, dim=32, dim_v=32, dtype=dtype)
    layout, _ = select(row, row.pattern, *low[:2], host)
    reasons = refusals(impl, AttentionCall(*low, layout, host.base(), 1.0))
    if reasons:
        assert impl != "gather"
        with pytest.raises(UnsupportedError, match=re.escape(reasons[0])):
            run(*low, layout, host, impl)
        return
    leaves = [t.clone().requires_grad_() for t in low]
    trains = not refusals(impl, AttentionCall(*leaves, layout, host.base(), 1.0))
    assert trains or impl != "gather"
    *_, seen = loop(*low, layout, host)
    weight = torch.randn(low[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def solve(how: Any, dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_(trains) for t in low]
        out = how(*inputs)
        assert out.dtype == dtype
        if not trains:
            return [out]
        return [out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)]

    exact = solve(lambda q, k, v: masked(q, k, v, seen > 0), torch.float64)
    naive = solve(lambda q, k, v: plain(q, k, v, seen > 0), dtype)
    got = solve(lambda q, k, v: run(q, k, v, layout, host, impl, return_lse=False)[0], dtype)
    size = max(float(t.abs().max()) for t in exact)  # gradients of q and k are differences of terms as large as this
    names = ("out", "gradient of q", "gradient of k", "gradient of v")
    for what, a, b, c in zip(names[: len(got)], got, naive, exact, strict=True):
        within_budget(a, b, c, dtype, size, f"{impl} {what}")


@rows
@pytest.mark.parametrize("impl", ["gather", "auto"])
def test_autocast_keeps_dtype_and_budget(row: Row, impl: str) -> None:
    host = HOSTS["causal-129"]
    q, k, v = tensors(host, dim=32, dim_v=32, dtype=torch.float32)
    leaf = [t.clone().requires_grad_() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        layout, _ = select(row, row.pattern, q, k, host)
        *_, seen = loop(q, k, v, layout, host)
        out = run(*leaf, layout, host, impl, return_lse=False)[0]
        naive = plain(q.bfloat16(), k.bfloat16(), v.bfloat16(), seen > 0)
    assert out.dtype == torch.float32
    exact = masked(q.double(), k.double(), v.double(), seen > 0)
    within_budget(out.detach(), naive, exact, torch.bfloat16, float(exact.abs().max()), "autocast")
    out.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in leaf)


@pytest.mark.parametrize(
    "row",
    {row.pattern.registered_name: row for row in reversed(PATTERNS.values())}.values(),
    ids=lambda row: row.pattern.registered_name,
)
@pytest.mark.skipif(flex.unavailable() is not None, reason=str(flex.unavailable()))
def test_flex_equals_the_loop(row: Row) -> None:
    host = HOSTS["causal-129"]
    q, k, v = tensors(host, dim=32, dim_v=32, dtype=torch.float32)
    layout, _ = select(row, row.pattern, q, k, host)
    if not isinstance(layout, (BlockMask, type(None))):
        with pytest.raises(UnsupportedError, match="BlockMask"):
            run(q, k, v, layout, host, "flex", return_lse=False)
        return
    assert_close(run(q, k, v, layout, host, "flex", return_lse=False)[0], loop(q, k, v, layout, host)[0], 1e-5)
