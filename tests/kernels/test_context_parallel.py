"""Attention over ranks against attention of one process: methods × partitions × masks × heads, bytes, balance, failures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

import foveal
from foveal.core.base_mask import BaseMask
from foveal.kernels import context_parallel as cp
from foveal.kernels.call import AttentionCall
from foveal.kernels.dispatch import compute
from tests.ranks import RankPool

Case = dict[str, Any]

DOCUMENTS = (5, 16, 1, 10)
MASKS: dict[str, Case] = {
    "full": {},
    "causal": {"causal": True},
    "full_document": {"documents": DOCUMENTS},
    "causal_document": {"causal": True, "documents": DOCUMENTS},
    "sliding": {"causal": True, "window": 5},
    "sliding_both": {"window": 4},
    "document_sliding": {"causal": True, "window": 6, "documents": DOCUMENTS},
}
TOTAL = 32
MESHES = {
    "ulysses": [{}],
    "ring": [{}],
    "all_gather": [{}],
    "usp": [{"ulysses": 2}, {"ulysses": 2, "innermost": "ring"}],
    "double_ring": [{"windows": 2}, {"ulysses": 2, "windows": 2}, {"ulysses": 2}],
}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


# --- jobs that run on every rank ----------------------------------------------------------------------------------------

_groups: dict[Any, Any] = {}


def mesh(ranks: int, method: str, **options: Any) -> cp.RankMesh:
    """A mesh of so many neighbouring ranks, made once."""
    key = (ranks, method, tuple(sorted(options.items())))
    if key not in _groups:
        if ("group", ranks) not in _groups:
            first = dist.get_rank() // ranks * ranks  # the other ranks do the same among themselves
            members = list(range(first, first + ranks))
            _groups["group", ranks] = dist.new_group(members, use_local_synchronization=True)
        _groups[key] = cp.mesh_for(method, _groups["group", ranks], timeout=60, **options)
    return _groups[key]


def whole(case: Case) -> tuple[list[torch.Tensor], BaseMask]:
    """q, k, v and the gradient of out for the whole sequence (the same on every rank), and its mask."""
    heads, kv_heads, total = case.get("heads", 4), case.get("kv_heads", 2), case.get("total", TOTAL)
    make = torch.Generator().manual_seed(case.get("seed", 0))
    dtype = case.get("dtype", torch.float64)
    sizes = [(heads, 8), (kv_heads, 8), (kv_heads, 8), (heads, 8)]
    tensors = [torch.randn(2, h, total, d, generator=make, dtype=torch.float64).to(dtype) for h, d in sizes]
    mask = cp.mask_of(total, **case.get("mask", {"causal": True}))
    return tensors, mask


def expected(case: Case) -> list[torch.Tensor]:
    """out, lse and gradients of one process, in float64 by the reference."""
    (q, k, v, grad), mask = whole(case)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out, lse = compute(AttentionCall(q, k, v, None, mask, 8**-0.5, case.get("softcap")), "reference")
    of_lse = [lse] if case.get("grad_lse") else []
    scores = [(out * grad.double()).sum(), *[x.masked_fill(x == -torch.inf, 0).sum() for x in of_lse]]
    grads = torch.autograd.grad(sum(scores), (q, k, v))
    return [out.detach(), lse.detach(), *grads]


def run_case(case: Case) -> tuple[list[torch.Tensor], cp.RankMesh, cp.Partition, cp.Meter]:
    """This rank's out, lse and gradients, and the bytes of forward and backward."""
    (q, k, v, grad), mask = whole(case)
    m = mesh(case["ranks"], case["method"], **case.get("mesh", {}))
    places = cp.Partition(
        q.shape[2], m.ring, m.ulysses, case.get("partition", "zigzag"), case.get("cut"), pad=case.get("pad", False)
    )
    q, k, v, grad = (places.dispatch(x, *m.place) for x in (q, k, v, grad))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    m.meter.reset()
    out, lse = cp.context_parallel_attention(
        q, k, v, mask, mesh=m, method=case["method"], partition=places, impl=case.get("impl", "gather"), softcap=case.get("softcap"),
        return_lse=True,
    )  # fmt: skip
    forward = m.meter.bytes
    of_lse = [lse] if case.get("grad_lse") else []
    scores = [(out * grad).sum(), *[x.masked_fill(x == -torch.inf, 0).sum() for x in of_lse]]
    if case.get("twice"):
        torch.autograd.grad(sum(scores), (q, k, v), retain_graph=True)
    grads = torch.autograd.grad(sum(scores), (q, k, v))
    m.meter.sent["forward"], m.meter.sent["backward"] = forward, m.meter.bytes - forward
    return [out.detach(), lse.detach(), *grads], m, places, m.meter


def error_of(case: Case) -> float:
    """Largest difference from one process, relative where values are above 1."""
    got, m, places, _ = run_case(case)
    real = places.tokens[places.own(*m.place)] >= 0
    worst = 0.0
    for x, y in zip(got, expected(case), strict=True):
        dim = 2
        part = places.dispatch(y, *m.place, dim=dim)
        x, part = x.index_select(dim, real.nonzero()[:, 0]), part.index_select(dim, real.nonzero()[:, 0])
        same = (x == part) | ((x.double() - part.double()).abs() == 0)
        gap = torch.where(same, 0.0, (x.double() - part.double()).abs() / part.double().abs().clamp(min=1))
        assert not gap.isnan().any()
        worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


def errors(cases: list[Case]) -> list[float]:
    return [error_of(case) for case in cases]


def check(pool: RankPool, cases: list[Case], limit: float) -> None:
    for rank, found in enumerate(pool.run(errors, cases)):
        for case, gap in zip(cases, found, strict=True):
            assert gap <= limit, f"rank {rank}: {gap:.3g} in {case}"


# --- exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", cp.METHODS)
def test_every_mechanism_equals_one_process_float64(pool: RankPool, method: str) -> None:
    """Sheet section 6, 1: ranks 2 and 4, all masks and partitions, GQA and MHA, forward and gradients."""
    cases = [
        {"ranks": 4, "method": method, "mesh": options, "partition": partition, "mask": mask, "kv_heads": 2}
        for options, partition, mask in product(MESHES[method], cp.PARTITIONS, MASKS.values())
    ]
    cases += [
        {"ranks": 2, "method": method, "partition": partition, "mask": mask, "kv_heads": 4}
        for partition, mask in product(cp.PARTITIONS, MASKS.values())
    ]
    check(pool, cases, 1e-12)


def test_float32_by_every_implementation(pool: RankPool) -> None:
    """At most 2e-6 from one process, by native kernels, torch's SDPA, gather, reference and whatever auto picks."""
    cases = [
        {"ranks": ranks, "method": method, "impl": impl, "mask": MASKS[mask], "dtype": torch.float32}
        for ranks, method, impl, mask in product(
            (2, 4), ("ring", "usp", "all_gather", "double_ring"), ("native", "sdpa", "gather", "reference", "auto"),
            ("causal", "document_sliding"),
        )
    ]  # fmt: skip
    check(pool, cases, 2e-6)


def test_padding_and_documents_cut_one_by_one(pool: RankPool) -> None:
    """Lengths that do not divide, documents shorter than 2R, documents of one token."""
    documents = (3, 1, 20, 7)
    cases = [
        {"ranks": ranks, "method": method, "total": 31, "cut": documents, "pad": True, "mask": {"causal": causal, "documents": documents}}
        for ranks, method, causal in product((2, 4), cp.METHODS, (True, False))
    ] + [
        {"ranks": 4, "method": method, "total": 29, "pad": True, "partition": partition, "mask": mask}
        for method, partition, mask in product(("ring", "usp"), cp.PARTITIONS, ({"causal": True}, {}, {"window": 3}))
    ]  # fmt: skip
    check(pool, cases, 1e-12)


def test_softcap_and_gradient_of_the_log_sum_exp(pool: RankPool) -> None:
    cases = [
        {"ranks": 4, "method": method, "softcap": 1.5, "grad_lse": True, "impl": impl, "mask": mask}
        for method, impl, mask in product(("ring", "double_ring", "usp"), ("gather", "reference"), MASKS.values())
    ]
    check(pool, cases, 1e-12)


def test_a_second_backward_of_the_same_graph(pool: RankPool) -> None:
    """The keys that came last are let go by the first one, and sent again for the second."""
    meshes = [(2, "ring"), (4, "ring"), (4, "usp"), (4, "double_ring"), (4, "all_gather")]
    check(pool, [{"ranks": ranks, "method": method, "twice": True} for ranks, method in meshes], 1e-12)


def test_replicated_kv_heads(pool: RankPool) -> None:
    """Sheet section 6, 9: fewer key heads than Ulysses ranks; gradients are summed over the replicas."""
    check(pool, [{"ranks": 4, "method": "ulysses", "kv_heads": kv} for kv in (1, 2, 4)], 1e-12)


# --- bytes and balance --------------------------------------------------------------------------------------------------


def bytes_of(cases: list[Case]) -> list[tuple[int, int, int, int]]:
    """Counted and predicted, forward and backward."""
    found = []
    for case in cases:
        (q, k, v, grad), mask = whole(case)
        m = mesh(case["ranks"], case["method"], **case.get("mesh", {}))
        places = cp.Partition(TOTAL, m.ring, m.ulysses)
        q, k, v, grad = (places.dispatch(x, *m.place) for x in (q, k, v, grad))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        m.meter.reset()
        out = cp.context_parallel_attention(q, k, v, mask, mesh=m, method=case["method"], impl="gather")
        forward = m.meter.bytes
        out.backward(grad)
        formula = cp.volume(
            case["method"], TOTAL, 4, case["kv_heads"], 8, ulysses=m.ulysses, ring=m.ring, windows=m.windows, batch=2
        )
        found.append((forward, m.meter.bytes - forward, *formula.bytes(q.element_size())))
    return found


def test_byte_counters_equal_the_table(pool: RankPool) -> None:
    """Sheet section 6, 4."""
    cases = [
        {"ranks": ranks, "method": method, "mesh": options, "kv_heads": kv, "dtype": dtype}
        for method in cp.METHODS
        for ranks, options in [(2, {}), *[(4, options) for options in MESHES[method]]]
        for kv, dtype in ((1, torch.float64), (4, torch.bfloat16))
    ]
    for found in pool.run(bytes_of, cases):
        for case, (forward, backward, *formula) in zip(cases, found, strict=True):
            assert [forward, backward] == formula and forward > 0, case


def test_formulas_are_the_published_ones() -> None:
    t, hq, hk, d, p = 960, 8, 4, 16, 4
    n = t // p
    assert cp.volume("ulysses", t, hq, hk, d, ulysses=p).forward == 2 * (p - 1) * t * (hq + hk) * d // p**2
    assert cp.volume("ring", t, hq, hk, d, ring=p).forward == 2 * (p - 1) * t * hk * d // p
    gather = cp.volume("all_gather", t, hq, hk, d, ring=p)
    assert gather.backward + gather.sums == 4 * (p - 1) * t * hk * d // p
    ring = cp.volume("ring", t, hq, hk, d, ring=p)  # the table, less the hop that would bring a rank its own keys
    assert ring.backward + ring.sums == 4 * (p - 1) * t * hk * d // p - 2 * n * hk * d
    assert cp.volume("usp", t, hq, hk, d, ring=p) == ring
    assert cp.volume("usp", t, hq, hk, d, ulysses=p) == cp.volume("ulysses", t, hq, hk, d, ulysses=p)
    for windows in (1, p):
        assert cp.volume("double_ring", t, hq, hk, d, ring=p, windows=windows).forward == ring.forward


def pairs_of(partition: str, ranks: int) -> list[int]:
    """Visible pairs of each rank, as the ring counts them step by step."""
    mask, places = cp.mask_of(TOTAL, causal=True), cp.Partition(TOTAL, ranks, 1, partition)
    from foveal.kernels.context_parallel.masks import part

    steps = [[part(mask, places.shard(r), places.shard(s)) for s in range(ranks)] for r in range(ranks)]
    return [sum(0 if p is None else p.pairs for p in row) for row in steps]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_causal_balance(ranks: int) -> None:
    """Sheet section 6, 3: areas sum to the mask's; zig-zag is even, contiguous reaches (2P−1)/P up to the diagonal."""
    area, h, n = TOTAL * (TOTAL + 1) // 2, TOTAL // (2 * ranks), TOTAL // ranks
    assert pairs_of("zigzag", ranks) == [h * h * (2 * ranks - 1) + h * (h + 1)] * ranks
    contiguous = pairs_of("contiguous", ranks)
    assert sum(contiguous) == sum(pairs_of("striped", ranks)) == area
    assert contiguous[-1] == n * (ranks - 1) * n + n * (n + 1) // 2
    assert max(contiguous) / (area / ranks) == pytest.approx((2 * ranks - 1) / ranks, rel=1 / n)


# --- partitions ---------------------------------------------------------------------------------------------------------


def test_dispatch_and_undispatch_are_inverse() -> None:
    """Sheet section 6, 2."""
    for total, documents in ((1, None), (7, None), (64, None), (31, (3, 1, 20, 7)), (9, (1,) * 9)):
        for r, u, kind in product((1, 2, 3), (1, 2), cp.PARTITIONS):
            places = cp.Partition(total, r, u, kind, documents, pad=True)
            x = torch.arange(2 * total).view(2, total, 1)
            parts = [places.dispatch(x, a, b, fill=-1) for a in range(r) for b in range(u)]
            assert torch.equal(places.undispatch(parts), x)
            where = torch.cat([places.own(a, b) for a in range(r) for b in range(u)])
            assert torch.equal(where.sort().values, torch.arange(places.length))
            assert all(bool((places.shard(a).diff() > 0).all()) for a in range(r))


def test_lengths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(foveal.FovealError, match="30 tokens do not divide over 4 ring"):
        cp.Partition(30, 4)
    with pytest.raises(foveal.FovealError, match="document of 6"):
        cp.Partition(22, 4, documents=(16, 6))
    with pytest.raises(foveal.FovealError, match="zigzag"):
        cp.Partition(32, 4, kind="zigzg")


def test_one_rank_is_the_local_kernel() -> None:
    """Sheet section 6, 1: with P = 1 the result is that of the kernel, bit for bit."""
    q, k, v = (torch.randn(1, h, 200, 16) for h in (4, 2, 2))
    alone = cp.mesh_for("ring")
    for impl in ("native", "gather", "reference"):
        if impl == "native" and foveal.kernels.dispatch.missing("native"):
            continue
        got = foveal.context_parallel_attention(q, k, v, mesh=alone, causal=True, impl=impl)
        assert torch.equal(got, foveal.attention(q, k, v, causal=True, impl=impl))


# --- failures -----------------------------------------------------------------------------------------------------------


def fails(kind: str) -> str:
    """The message of the error that this rank gets."""
    m = mesh(4, "ring")
    shape = [1, 4, 8, 8]
    rank = dist.get_rank()
    options: Case = {"method": "ring", "impl": "gather"}
    try:
        if kind == "one rank differs" and rank == 2:
            options["scale"] = 0.5
        if kind == "one rank is wrong" and rank == 1:
            options["impl"] = "gathr"
        if kind == "heads":
            m, shape[1], options["method"] = mesh(4, "ulysses"), 6, "ulysses"
        if kind == "version" and rank == 3:
            foveal.__version__ = "0.0.1"
            shape[2] = 16
        if kind == "version":
            shape[2] = 16
        q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
        foveal.context_parallel_attention(q, k, v, mesh=m, causal=True, **options)
    except foveal.FovealError as error:
        return str(error)
    finally:
        if rank == 3 and kind == "version":
            import importlib.metadata

            foveal.__version__ = "0.1.0"
            assert importlib.metadata.version("foveal") == foveal.__version__
    return ""


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("one rank differs", "differ in scale: rank 0 has .* rank 2 has 0.5"),
        ("one rank is wrong", "rank 1 of 4: impl='gathr' is unknown"),
        ("heads", "6 query heads do not divide over 4 Ulysses ranks"),
        ("version", "differ in foveal: rank 0 has .* rank 3 has"),
    ],
)
def test_one_clear_error_on_every_rank(pool: RankPool, kind: str, says: str) -> None:
    import re

    messages = pool.run(fails, kind)
    assert len(set(messages)) == 1 and re.search(says, messages[0]), messages


def dies(kind: str) -> str:
    m = cp.mesh_for("ring", timeout=4)
    q, k, v = (torch.randn(1, 4, 8, 8) for _ in range(3))
    foveal.context_parallel_attention(q, k, v, mesh=m, causal=True, impl="gather")
    if dist.get_rank() == 1:
        if kind == "dies":
            os._exit(3)
        return "late"
    try:
        foveal.context_parallel_attention(q, k, v, mesh=m, causal=True, impl="gather")
    except cp.RankError as error:
        return str(error)
    return "nothing noticed"


@pytest.mark.parametrize("kind", ["dies", "is late"])
def test_a_rank_that_dies_or_is_late_ends_the_run_on_every_rank(kind: str) -> None:
    """No result is wrong and nothing hangs; the next ranks notice at once, the others when their neighbour leaves."""
    with RankPool(2, timeout=30) as pair:
        outcomes = pair.outcomes(dies, kind)
    assert outcomes[1] == ((False, "dead") if kind == "dies" else (True, "late"))
    ok, message = outcomes[0]
    assert ok and message.startswith("rank 0 of 2 lost another rank during a hop of the ring"), message
