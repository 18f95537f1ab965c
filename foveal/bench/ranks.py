"""Context parallelism measured on this machine's ranks, and a model of what many GPUs would do.

Every rank runs :func:`measure`; rank 0 has the result. Bytes are counted in the collectives, compute is this thread's CPU
time inside local attention, memory is the process's peak, and errors are against one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.call import AttentionCall
from ..kernels.context_parallel import (
    FORMULAS,
    METHODS,
    Partition,
    RankMesh,
    context_parallel_attention,
    mask_of,
    mesh_for,
    volume,
)
from ..kernels.dispatch import compute
from .memory import PeakMemory, return_freed_blocks

SCHEMA = "foveal.ranks/1"
LIMIT = 2e-6
"""Largest error in float32 against one process in float64, in units of the tensor's largest value (at least 1)."""


@dataclass(frozen=True)
class Sizes:
    """Lengths: ``exact`` for errors against one process and bytes, ``balance`` for CPU time, ``memory`` for peaks.

    ``wide`` are the query and key heads of ``memory``, as many as a Llama-type model of 8B has: with fewer key heads than ranks
    Ulysses holds copies, and a kernel that packs one key head after another needs as much for one head as for eight.
    """

    exact: int = 1024
    balance: int = 8192
    memory: int = 16384
    heads: int = 8
    kv_heads: int = 2
    wide: tuple[int, int] = (32, 8)
    head_dim: int = 64
    repeats: int = 3


QUICK = Sizes(exact=256, balance=2048, memory=0, head_dim=32, repeats=1)

Report = Callable[[str, int, int], None]


def measure(
    sizes: Sizes, report: Report, *, timeout: float = 60.0, impl: str = "auto", seed: int = 0
) -> dict[str, Any]:
    """Everything, on all ranks of torch.distributed alike; the result is the same on every rank.

    Raises:
        RankError: on every rank, when one dies, is late or differs.
    """
    meshes = {method: mesh_for(method, timeout=timeout) for method in METHODS}
    jobs: list[tuple[str, str, Callable[[], dict[str, Any]]]] = [
        *[("exact", name, partial(exactness, meshes[name], name, sizes, impl, seed)) for name in METHODS],
        *[("balance", kind, partial(balance, meshes["ring"], kind, sizes, impl, seed)) for kind in ("contiguous", "zigzag")],
    ]  # fmt: skip
    if sizes.memory:
        jobs += [("memory", name, partial(memory, meshes[name], name, sizes, impl, seed)) for name in METHODS]
    found: dict[str, dict[str, Any]] = {"exact": {}, "balance": {}, "memory": {}}
    for done, (kind, name, job) in enumerate(jobs):
        report(f"{kind}: {name}", done, len(jobs))
        meshes["ring"].everyone.barrier(timeout)
        found[kind][name] = job()
    ranks = meshes["ring"].size
    mismatches = [name for name, row in found["exact"].items() if not row["equal"] or row["error"] > LIMIT]
    pairs = found["balance"]["zigzag"]["pairs"]
    if len(set(pairs)) > 1:
        mismatches.append("zigzag balance")
    return {
        "schema": SCHEMA, "ranks": ranks, "sizes": asdict(sizes), "limit": LIMIT, "impl": impl, "seed": seed, **found,
        "contiguous_by_formula": (2 * ranks - 1) / ranks, "mismatches": mismatches, "prediction": predict(),
    }  # fmt: skip


def _tensors(sizes: Sizes, tokens: int, seed: int, heads: tuple[int, int] | None = None) -> list[Tensor]:
    """q, k, v and the gradient of out, the same on every rank."""
    make = torch.Generator().manual_seed(seed)
    q, kv = heads or (sizes.heads, sizes.kv_heads)
    return [torch.randn(1, h, tokens, sizes.head_dim, generator=make) for h in (q, kv, kv, q)]


def _every(mesh: RankMesh, value: float) -> list[float]:
    """One number of every rank."""
    return mesh.everyone.all_gather(torch.tensor([value], dtype=torch.float64))[:, 0].tolist()


def exactness(mesh: RankMesh, method: str, sizes: Sizes, impl: str, seed: int) -> dict[str, Any]:
    """Error of out and gradients against one process (float64), over four masks; bytes counted and by formula."""
    t = sizes.exact
    cut = (t // 2 - 3, 1, t // 4, t - t // 2 - t // 4 + 2)
    masks: dict[str, dict[str, Any]] = {
        "full": {}, "causal": {"causal": True}, "document": {"causal": True, "documents": cut}, "sliding": {"causal": True, "window": t // 8},
    }  # fmt: skip
    errors, counted = {}, (0, 0)
    whole = _tensors(sizes, t, seed)
    places = Partition(t, mesh.ring, mesh.ulysses)
    for name, words in masks.items():
        q, k, v, grad = (places.dispatch(x, *mesh.place).requires_grad_() for x in whole)
        mesh.meter.reset()
        out = context_parallel_attention(
            q, k, v, mask_of(t, **words), mesh=mesh, method=method, partition=places, impl=impl
        )
        forward = mesh.meter.bytes
        got = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        counted = forward, mesh.meter.bytes - forward
        wq, wk, wv = (x.double().requires_grad_() for x in whole[:3])
        one, _ = compute(AttentionCall(wq, wk, wv, None, mask_of(t, **words), sizes.head_dim**-0.5), "reference")
        expected = [one, *torch.autograd.grad(one, (wq, wk, wv), whole[3].double())]
        gaps = []
        for x, y in zip(got, expected, strict=True):
            part = places.dispatch(y.detach(), *mesh.place)
            gaps.append(float((x.detach() - part).abs().max() / y.detach().abs().max().clamp(min=1)))
        errors[name] = max(_every(mesh, math.inf if math.isnan(max(gaps)) else max(gaps)))
    formula = volume(
        method,
        t,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        ulysses=mesh.ulysses,
        ring=mesh.ring,
        windows=mesh.windows,
    ).bytes(4)
    everyone = [_every(mesh, x) for x in counted]
    equal = all(set(values) == {float(want)} for values, want in zip(everyone, formula, strict=True))
    return {
        "mesh": {"ulysses": mesh.ulysses, "ring": mesh.ring, "windows": mesh.windows}, "error": max(errors.values()),
        "errors": errors, "bytes_forward": counted[0], "bytes_backward": counted[1], "formula_forward": formula[0],
        "formula_backward": formula[1], "formula": FORMULAS[method], "equal": equal,
    }  # fmt: skip


def balance(mesh: RankMesh, kind: str, sizes: Sizes, impl: str, seed: int) -> dict[str, Any]:
    """CPU seconds of each rank's causal ring attention, forward and backward, and its visible pairs."""
    t = sizes.balance
    places = Partition(t, mesh.ring, mesh.ulysses, kind)
    q, k, v, grad = (places.dispatch(x, *mesh.place).requires_grad_() for x in _tensors(sizes, t, seed))
    mask, best = mask_of(t, causal=True), math.inf
    for turn in range(-1, sizes.repeats):
        mesh.meter.reset()
        out = context_parallel_attention(q, k, v, mask, mesh=mesh, partition=places, impl=impl)
        torch.autograd.grad(out, (q, k, v), grad)
        if turn >= 0:
            best = min(best, mesh.meter.compute_s)
    seconds, pairs = _every(mesh, best), [int(x) for x in _every(mesh, mesh.meter.pairs)]
    return {
        "cpu_s": seconds, "pairs": pairs, "max_over_mean": max(seconds) / (sum(seconds) / len(seconds)),
        "pairs_max_over_mean": max(pairs) / (sum(pairs) / len(pairs)),
    }  # fmt: skip


def memory(mesh: RankMesh, method: str, sizes: Sizes, impl: str, seed: int) -> dict[str, Any]:
    """Peak MiB of each rank: its q, k, v, out, their gradients and everything that the method holds on the way."""
    return_freed_blocks()
    for t in (sizes.memory // 16, sizes.memory):  # the first, small one loads and connects what is needed once
        mask = mask_of(t, causal=True, window=max(t // 32, 1))  # memory does not depend on the mask; time does
        with PeakMemory() as peak:
            q, k, v, grad = (x.requires_grad_() for x in _tensors(sizes, t // mesh.size, seed, sizes.wide))
            out = context_parallel_attention(q, k, v, mask, mesh=mesh, method=method, impl=impl)
            grads = torch.autograd.grad(out, (q, k, v), grad)
            del q, k, v, grad, out, grads
    per_rank = _every(mesh, peak.extra_mb)
    return {"peak_mib": max(per_rank), "per_rank": per_rank}


@dataclass(frozen=True)
class Cluster:
    """What the prediction assumes: nodes of 8 H100-like GPUs. Datasheet numbers, with stated efficiencies.

    Attributes:
        gpus, per_node: how many. flops: attained bf16 FLOP/s of one GPU. inside, across: bytes/s of one GPU to its
            neighbours in the node, and to other nodes. latency: seconds of a message.
    """

    gpus: int = 96
    per_node: int = 8
    flops: float = 500e12
    inside: float = 350e9
    across: float = 40e9
    latency: float = 20e-6


MODEL = (
    "seconds = exchange + max(compute, keys) per direction; exchange = bytes of all-to-all / bandwidth + 4·latency (not hidden); "
    "keys = bytes of hops / bandwidth + hops·latency (hidden behind compute, except for all_gather, where the two add up); compute = 4·area·Hq·d/(P·flops) forward, "
    "2.5 times as much backward; bandwidth = inside when the line of ranks lies in one node, else across; a double ring's inner hops count inside"
)


def predict(cluster: Cluster | None = None, *, tokens_per_gpu: int = 8192, heads: int = 64, kv_heads: int = 8, head_dim: int = 128) -> dict[str, Any]:  # fmt: skip
    """Seconds and TFLOP/s per GPU of each method by a stated model; a model, not a measurement.

    Heads must be shared: Ulysses over all GPUs is reported as unsupported where the heads do not divide.
    """
    c = cluster or Cluster()
    p, t = c.gpus, tokens_per_gpu * c.gpus
    node = min(c.per_node, p)
    ways = {
        "ulysses": (p, 1, 1), "ring": (1, p, 1), "all_gather": (1, p, 1), "usp": (node, p // node, 1),
        "double_ring": (1, p, max(p // node, 1)),
    }  # fmt: skip
    rows: dict[str, Any] = {}
    for method, (u, r, w) in ways.items():
        shared = {"ulysses": u, "ring": r, "windows": w}
        if heads % u or (kv_heads % u and u % kv_heads):
            rows[method] = {
                **shared,
                "unsupported": f"{heads} query and {kv_heads} key heads do not divide over {u} ranks",
            }
            continue
        rows[method] = {"mesh": shared}
        for mask, area in (("full", t * t), ("causal", t * (t + 1) // 2)):
            seconds = _seconds(c, method, (u, r, w), t, heads, kv_heads, head_dim, area)
            flops = 3.5 * 4 * area * heads * head_dim / p
            rows[method][mask] = {"seconds": seconds, "tflops_per_gpu": flops / seconds / 1e12}
    return {
        "label": "a model, not a measurement", "model": MODEL, "parameters": asdict(c), "tokens": t, "heads": heads,
        "kv_heads": kv_heads, "head_dim": head_dim, "rows": rows,
    }  # fmt: skip


def _seconds(c: Cluster, method: str, shape: tuple[int, int, int], t: int, heads: int, kv_heads: int, dim: int, area: int) -> float:  # fmt: skip
    u, r, w = shape
    both = volume(method, t, heads, kv_heads, dim, ulysses=u, ring=r, windows=w)
    a2a = volume(method, t, heads, kv_heads, dim, ulysses=u).forward * 2 / r if u > 1 else 0
    exchange = a2a / (c.inside if u <= c.per_node else c.across) + (4 * c.latency if u > 1 else 0)
    compute_s = 4 * area * heads * dim / c.gpus / c.flops
    total = 0.0
    for bytes_, factor in zip(both.bytes(2), (1.0, 2.5), strict=True):
        keys = bytes_ - a2a
        hops = max(r - 1, 0) * (1 if factor == 1 else 2)
        wire = c.inside if r * u <= c.per_node else c.across
        spent = keys / wire + hops * c.latency
        if method == "double_ring" and w > 1:  # the next window is fetched once in S steps; the rest stays in the node
            outer = keys * w / r
            spent = max(outer / c.across, (keys - outer) / c.inside) + hops * c.latency
        work = compute_s * factor
        total += exchange + (work + spent if method == "all_gather" else max(work, spent))
    return total
