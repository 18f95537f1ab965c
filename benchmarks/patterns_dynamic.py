"""How fast the patterns that choose by content are, with their selection counted, beside torch's dense SDPA.

Usage: python benchmarks/patterns_dynamic.py [--lengths 4096 8192 16384] [--memory-length 32768] [--repeats 3] [--patterns NAME …] [--no-flex]

8 heads of 64, float32. Keys come in segments of 64 tokens, each around one of 64 random topics; every query asks for topics of
four earlier segments, so that there is something to choose. A pattern's time is selection plus attention by ``gather``; the
selection's share stands beside it. SDPA runs with the pattern's own base mask: causal, or full for VMoBA on its grid.
Targets are for the attention alone: by ``gather`` at least 0.6 / tile density times faster than SDPA, and where the C++ kernels are there,
by ``native`` at least 0.8 / tile density times faster than their own dense attention. Token top-k is measured for one new token
(its prefill computes every logit) and has no target. ``flex`` is torch's compiled FlexAttention on the same blocks, where the pattern
keeps blocks, beside the attention of ``gather`` and ``native`` alone. ``memory`` is the peak of the selection alone at the longest
length, in MiB and in units of one float32 per query, block and head, of which it may take 8 at most where keys are chosen by blocks; of
routing attention it is the peak of clustering and attention together, in units of query, cluster and head.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import foveal
from foveal.bench.flex import flex_job
from foveal.bench.memory import MIB, PeakMemory
from foveal.bench.results import load_average, rounded, write_result
from foveal.bench.timing import SHORT, Spread, interleaved, speedups
from foveal.core.base_mask import BaseMask
from foveal.core.budget import Budget
from foveal.core.context import SelectContext, Selection
from foveal.core.density import measure
from foveal.core.layouts import Layout
from foveal.kernels import native
from foveal.layers.routing import RoutingAttention
from foveal.patterns import DHSA, BlockTopK, MoBA, Pattern, Reuse, SparseD, TokenTopK, VMoBA, XAttention
from foveal.patterns.presets import FLUX

HEADS, DIM, TOPICS, SEGMENT, WANTED, SEED = 8, 64, 64, 64, 4, 0
TARGET, NATIVE_TARGET, MEMORY_TARGET = 0.6, 0.8, 8.0
CLUSTERS, MEMBERS = 128, 256


@dataclass(frozen=True)
class Case:
    """A pattern, whether it is causal, whether it is measured for one new token, and keys per block (for ``memory``)."""

    pattern: Callable[[int], Pattern]
    block: int
    causal: bool = True
    decode: bool = False


def grid(length: int) -> tuple[int, int, int]:
    """Frames of 16 × 16 tokens."""
    return max(1, length // 256), 16, 16


def boxes(length: int) -> VMoBA:
    """3-D boxes of 512 tokens, half as many frames where the video is shorter."""
    return VMoBA(blocks=((min(8, grid(length)[0]), 8, 8),), threshold=0.25)


CASES: dict[str, Case] = {
    "moba": Case(lambda n: MoBA(block=512, top_k=3), 512),
    "vmoba": Case(boxes, 512, causal=False),
    "xattention": Case(lambda n: XAttention(Budget(mass=0.9)), 128),
    "xattention_0.5": Case(lambda n: XAttention(Budget(mass=0.5)), 128),
    "block_topk": Case(lambda n: BlockTopK(Budget(density=0.125)), 64),
    "reuse": Case(lambda n: Reuse(0), 64),
    "flux_streaming": Case(lambda n: FLUX["streaming"], 128),
    "dhsa": Case(lambda n: DHSA(Budget(density=0.125)), 32),
    "dhsa_chunk": Case(lambda n: DHSA(Budget(tokens=max(1, n // 8)), variant="chunk"), 64),
    "sparsed": Case(lambda n: SparseD(keep=0.3), 128, causal=False),
    "token_topk": Case(lambda n: TokenTopK(Budget(tokens=max(1, n // 16))), 1, decode=True),
}


def tensors(length: int) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(SEED)
    segment = torch.arange(length) // SEGMENT
    count = int(segment[-1]) + 1
    centres = torch.randn(HEADS, TOPICS, DIM, generator=make)
    topic = torch.randint(TOPICS, (count,), generator=make)
    k = centres[:, topic[segment]] + torch.randn(HEADS, length, DIM, generator=make)
    asked = (torch.rand(count, WANTED, generator=make) * torch.arange(1, count + 1)[:, None]).long()
    q = 0.5 * centres[:, topic[asked]].sum(2)[:, segment] + 0.5 * torch.randn(HEADS, length, DIM, generator=make)
    return q[None], k[None], torch.randn(1, HEADS, length, DIM, generator=make)


def select(name: str, q: Tensor, k: Tensor, earlier: Layout | None) -> Layout | None:
    """The layout of one call, chosen afresh: nothing is kept between calls."""
    case, length = CASES[name], k.shape[2]
    base = BaseMask.build(q.shape[2], length, causal=case.causal, device=q.device)
    ctx = SelectContext(base, 1, q_offset=max(base.shift, 0), grid=grid(length), earlier={0: Selection(earlier, None)})
    return case.pattern(length).select(q, k, ctx, None)[0]


def measure_length(length: int, names: list[str], repeats: int, use_flex: bool) -> dict[str, Any]:
    q, k, v = tensors(length)
    one, whole = q[:, :, -1:], q
    causal_base = BaseMask.build(length, length, causal=True)
    earlier = CASES["block_topk"].pattern(length).select(q, k, SelectContext(causal_base), None)[0]
    fast = native.unavailable() is None
    by_flex: dict[str, str] = {}
    jobs: dict[str, Callable[[], Any]] = {}
    for kind in sorted({_kind(CASES[name]) for name in (*names, "block_topk")}):
        rows, causal = one if kind == "one token" else whole, kind == "causal"
        jobs[f"sdpa {kind}"] = partial(F.scaled_dot_product_attention, rows, k, v, is_causal=causal)
        if fast:
            jobs[f"native {kind}"] = partial(foveal.attention, rows, k, v, causal=causal, impl="native")
    for name in names:
        rows = one if CASES[name].decode else whole

        def both(impl: str, name: str = name, rows: Tensor = rows) -> Tensor:
            layout = select(name, rows, k, earlier)
            return foveal.attention(rows, k, v, layout, causal=CASES[name].causal, impl=impl)

        jobs[name] = partial(both, "gather")
        chosen, causal = select(name, rows, k, earlier), CASES[name].causal
        if use_flex and not CASES[name].decode:
            job, by_flex[name] = flex_job(rows, k, v, chosen, BaseMask.build(length, length, causal=causal))
            if job is not None:
                jobs[f"{name} flex"] = job
        jobs[f"{name} attention"] = partial(foveal.attention, rows, k, v, chosen, causal=causal, impl="gather")
        if fast:
            jobs[f"{name} native"] = partial(both, "native")
            jobs[f"{name} native attention"] = partial(
                foveal.attention, rows, k, v, chosen, causal=causal, impl="native"
            )
        jobs[f"{name} selection"] = lambda name=name, rows=rows: select(name, rows, k, earlier)  # type: ignore[misc]
    with torch.no_grad():
        seconds = interleaved(jobs, repeats, at_least=SHORT)
        dense = {name: job() for name, job in jobs.items() if name.startswith("sdpa")}
        out: dict[str, Any] = {name: {"milliseconds": Spread.of(seconds[name]).median * 1e3} for name in dense}
        for name in names:
            out[name] = _row(
                name,
                seconds,
                dense,
                jobs[name](),
                select(name, one if CASES[name].decode else whole, k, earlier),
                length,
            )
            if name in by_flex:
                out[name]["flex"] = _flex_row(name, seconds, by_flex[name], jobs)
    return out


def _flex_row(
    name: str, seconds: dict[str, list[float]], what: str, jobs: dict[str, Callable[[], Any]]
) -> dict[str, Any]:
    """FlexAttention's time, and how many times faster the attention alone is by ``gather`` and by ``native``; or why there is none."""
    if f"{name} flex" not in jobs:
        return {"left_out": what}
    fast = speedups(seconds, f"{name} flex")
    mine = {"gather": f"{name} attention", "native": f"{name} native attention"}
    return {
        "what": what,
        "milliseconds": Spread.of(seconds[f"{name} flex"]).median * 1e3,
        "difference": float((jobs[f"{name} flex"]() - jobs[f"{name} attention"]()).abs().max()),
        "times_faster_than_flex": {impl: fast[job].json() for impl, job in mine.items() if job in fast},
    }


def _by_flex(row: dict[str, Any]) -> str:
    if "times_faster_than_flex" not in row.get("flex", {}):
        return ""
    return "".join(
        f", {impl} {found['median']:.2f}× flex" for impl, found in row["flex"]["times_faster_than_flex"].items()
    )


def _kind(case: Case) -> str:
    return "one token" if case.decode else "causal" if case.causal else "full"


def _row(
    name: str,
    seconds: dict[str, list[float]],
    dense: dict[str, Tensor],
    got: Tensor,
    layout: Layout | None,
    length: int,
) -> dict[str, Any]:
    case = CASES[name]
    against = f"sdpa {_kind(case)}"
    base = BaseMask.build(1 if case.decode else length, length, causal=case.causal)
    kept = measure(layout, base, 1, HEADS)
    time, choosing = Spread.of(seconds[name]).median, Spread.of(seconds[f"{name} selection"]).median
    fast = speedups(seconds, against)
    attention = fast[f"{name} attention"]
    row: dict[str, Any] = {
        "milliseconds": time * 1e3,
        "selection_share": choosing / time,
        "density": kept.density,
        "tile_density": kept.tile_density,
        "times_faster_than_sdpa": fast[name].json(),
        "attention_over_sdpa": attention.json(),
        "relative_error": float((got - dense[against]).norm() / dense[against].norm()),
    }
    if not case.decode:
        row["target"] = TARGET / kept.tile_density
        row["met"] = attention.median >= row["target"]
    if f"{name} native" in seconds:
        alone = speedups(seconds, f"native {_kind(case)}")[f"{name} native attention"]
        row["native"] = {
            "milliseconds": Spread.of(seconds[f"{name} native"]).median * 1e3,
            "times_faster_than_sdpa": fast[f"{name} native"].json(),
            "attention_over_own_dense": alone.json(),
        }
        if not case.decode:
            target = NATIVE_TARGET / kept.tile_density
            row["native"] |= {"target": target, "met": alone.median >= target}
    return row


def _by_native(row: dict[str, Any]) -> str:
    if "native" not in row:
        return ""
    found = row["native"]
    aimed = f", target {found['target']:.2f}" if "target" in found else ""
    return (
        f"; native {found['milliseconds']:.1f} ms, {found['times_faster_than_sdpa']['median']:.2f}× SDPA, "
        f"attention {found['attention_over_own_dense']['median']:.2f}× own dense{aimed}"
    )


def measure_memory(length: int, names: list[str]) -> dict[str, Any]:
    q, k, _ = tensors(length)
    out = {}
    for name in names:
        if name in ("reuse",):
            continue  # chooses nothing
        rows = q[:, :, -1:] if CASES[name].decode else q
        small = tensors(2048)
        select(name, small[0][:, :, -1:] if CASES[name].decode else small[0], small[1], None)
        with PeakMemory() as peak, torch.no_grad():
            layout = select(name, rows, k, None)
        row = _memory(peak.extra_mb, rows.shape[2] * -(-length // CASES[name].block))
        out[name] = row if CASES[name].block > 1 else row | {"target": None, "met": None}
        del layout
    return out | {f"routing_{mode}": measure_routing(length, mode) for mode in ("strict", "paper")}


def measure_routing(length: int, mode: Literal["strict", "paper"]) -> dict[str, Any]:
    """Routing attention of all heads over tokens that are projected already."""
    model = RoutingAttention(HEADS * DIM, HEADS, clusters=CLUSTERS, window=MEMBERS, mode=mode)
    state = model.initial_state(SEED)

    def tokens(count: int) -> Tensor:
        return F.normalize(torch.randn(1, HEADS, count, DIM, generator=torch.Generator().manual_seed(SEED)), dim=-1)

    with torch.no_grad():
        model.route(tokens(2048), tokens(2048), state)
        q = tokens(length)
        with PeakMemory() as peak:
            model.route(q, q, state)
    return _memory(peak.extra_mb, length * CLUSTERS)


def _memory(added: float, pairs: int) -> dict[str, Any]:
    unit = 4 * HEADS * pairs / MIB
    times = added / unit
    return {"added_mb": added, "unit_mb": unit, "times": times, "target": MEMORY_TARGET, "met": times <= MEMORY_TARGET}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--memory-length", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patterns", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--no-flex", action="store_true", help="leave compiled FlexAttention out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "patterns_dynamic.json")
    args = parser.parse_args()
    load = load_average()
    memory = measure_memory(args.memory_length, args.patterns)
    lengths: dict[str, Any] = {}
    for length in args.lengths:
        lengths[str(length)] = rows = measure_length(length, args.patterns, args.repeats, not args.no_flex)
        for name in args.patterns:
            row = rows[name]
            print(
                f"{length:6d} {name:16s} {row['milliseconds']:8.1f} ms, {row['times_faster_than_sdpa']['median']:5.2f}× SDPA, "
                f"selection {100 * row['selection_share']:4.1f} %, density {row['density']:.3f}, tiles {row['tile_density']:.3f}, "
                f"error {row['relative_error']:.3f}"
                + (
                    f", attention {row['attention_over_sdpa']['median']:.2f}×, target {row['target']:.2f}"
                    if "target" in row
                    else ""
                )
                + _by_native(row)
                + _by_flex(row),
                flush=True,
            )
    for name, row in memory.items():
        print(
            f"{args.memory_length:6d} {name:16s} choosing adds {row['added_mb']:7.1f} MiB, {row['times']:.2f} × query·block·head"
        )
    result = {
        "what": "patterns that choose by content against torch's dense SDPA, selection included, medians of interleaved runs",
        "shape": {"heads": HEADS, "head_dim": DIM, "dtype": "float32", "threads": torch.get_num_threads()},
        "load_before": load,
        "repeats": args.repeats,
        "seconds_at_least": SHORT,
        "lengths": lengths,
        "memory_length": args.memory_length,
        "memory": memory,
    }
    write_result(args.out, rounded(result))


if __name__ == "__main__":
    main()
