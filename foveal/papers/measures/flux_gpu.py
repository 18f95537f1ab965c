"""Flux Attention's claims about time, on one GPU: a small decoder whose share of sparse layers is forced, and the router's own time.

A sparse layer keeps one sink block and 16 local blocks of 128 tokens. Forced decisions are static policies, so that no router runs
in what is timed as prefill and decoding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.base_mask import BaseMask
from ...core.context import SelectContext
from ...core.weights import file_sha256
from ...kernels.call import AttentionCall
from ...kernels.dispatch import compute
from ...layers.layer_router import LayerRouters
from ...models import DecoderLM
from ...models.blocks import Pass
from ...patterns import Pattern
from ...patterns.dense import Dense
from ...patterns.flux import prompt_spans
from ...patterns.flux_router import Routers, load_routers, pooled_queries
from ...patterns.presets import FLUX
from ...policies import Policy, Rule
from . import gpu
from .gpu_decode import Decoding
from .results import write_result

SPARSE = FLUX["streaming"]
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
WITHIN, FASTER, LITTLE = 0.15, 1.3, 0.05
VOCABULARY = 256


def forced(depth: int, share: float, sparse: Pattern = SPARSE) -> Policy:
    """``share`` of the layers sparse, spread evenly over the depth."""
    chosen = [int((i + 1) * share + 1e-9) > int(i * share + 1e-9) for i in range(depth)]
    return Policy(layers=tuple((i, Rule(sparse if some else Dense())) for i, some in enumerate(chosen)))


def measure_prefill(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    lengths: tuple[int, ...] = (32768, 65536, 131072),
    dim: int = 1024,
    depth: int = 8,
    heads: int = 8,
    kv_heads: int = 8,
    sparse: Pattern = SPARSE,
    checked: int = 4096,
    repeats: int = 5,
) -> dict[str, Any]:
    """Claim ``prefill-speedup``: times at five shares of sparse layers against the line between none and all.

    Args:
        checked: tokens of the call whose output is compared with dense attention under the same mask.
    """
    model = DecoderLM(VOCABULARY, dim, depth, heads, kv_heads).to(device, dtype).eval()
    rows, worst = {}, 0.0
    for length in lengths:
        ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
        jobs = {f"{share:g}": partial(model, ids, forced(depth, share, sparse)) for share in SHARES}
        row: dict[str, Any] = gpu.timed(jobs, repeats, device, baseline="0")
        full, thin = row["ratio"]["0"], row["ratio"]["1"]
        off = {f"{s:g}": row["ratio"][f"{s:g}"] / (full + s * (thin - full)) - 1 for s in SHARES}
        row["off_the_line"] = {share: round(value, 4) for share, value in off.items()}
        row["times_faster"] = round(1 / thin, 4)
        worst, rows[str(length)] = max(worst, *map(abs, off.values())), row
    q, k, v = gpu.drawn(heads, checked, dim // heads, device, dtype)
    ctx = SelectContext(BaseMask.build(checked, checked, causal=True, device=device))
    difference = gpu.pattern_error(sparse, q, k, v, ctx, heads=1)
    best = max(row["times_faster"] for row in rows.values())
    numbers = {
        "ours": f"all layers sparse {best:.2f}× at best; at most {100 * worst:.0f} % off the line between none and all",
        "criterion": WITHIN,
        "largest_distance_from_the_line": round(worst, 4),
        "difference": difference,
        "rows": rows,
    }
    decided = gpu.verdict(best > 1 and worst <= WITHIN, best > 1, difference=difference, dtype=dtype)
    return write_result("flux", "prefill-speedup", decided, numbers, seed=0, out=out)


def _decoding(
    batch: int, length: int, dim: int, depth: int, heads: int, kv_heads: int, device: str, dtype: torch.dtype, sparse: Pattern
) -> tuple[Decoding, float]:  # fmt: skip
    """The model, and the largest difference of a sparse layer from dense attention under the same mask."""
    model = Decoding(dim, depth, heads, kv_heads, batch, length, device, dtype)
    cache, ctx = model.cache(0), SelectContext(BaseMask.build(1, length, causal=True, device=device))
    return model, gpu.pattern_error(sparse, model.q, *cache, ctx)


def measure_decode(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    batch: int = 8,
    length: int = 131072,
    dim: int = 1024,
    depth: int = 8,
    heads: int = 8,
    kv_heads: int = 8,
    sparse: Pattern = SPARSE,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``decode-speedup``: whole decode steps at five shares of sparse layers; half of them is judged."""
    model, difference = _decoding(batch, length, dim, depth, heads, kv_heads, device, dtype, sparse)
    jobs = {f"{share:g}": partial(model.step, forced(depth, share, sparse)) for share in SHARES}
    row = gpu.timed(jobs, repeats, device, baseline="0")
    faster = {share: round(1 / ratio, 4) for share, ratio in row["ratio"].items()}
    numbers = {
        "ours": f"{faster['0.5']:.2f}× with half of the layers sparse, {faster['1']:.2f}× with all",
        "criterion": FASTER,
        "times_faster": faster,
        "ms": row["ms"],
        "difference": difference,
        "batch": batch,
        "keys": length,
    }
    decided = gpu.verdict(faster["0.5"] > FASTER, faster["0.5"] > 1, difference=difference, dtype=dtype)
    return write_result("flux", "decode-speedup", decided, numbers, seed=0, out=out)


def measure_heads(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    batch: int = 8,
    length: int = 131072,
    dim: int = 1024,
    depth: int = 8,
    heads: int = 8,
    kv_heads: int = 8,
    sparse: Pattern = SPARSE,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``layer-level-against-head-level``: half of the layers sparse, against half of the heads of every layer."""
    model, difference = _decoding(batch, length, dim, depth, heads, kv_heads, device, dtype, sparse)
    jobs = {
        "layer": partial(model.step, forced(depth, 0.5, sparse)),
        "head": partial(model.step, None, attend=partial(_half_of_the_heads, sparse)),
    }
    row = gpu.timed(jobs, repeats, device, baseline="layer")
    slower = row["ratio"]["head"]
    numbers = {
        "ours": f"head-level over layer-level decode time {slower:.3f}",
        "criterion": 1.0,
        **row,
        "difference": difference,
        "batch": batch,
        "keys": length,
    }
    decided = gpu.verdict(slower >= 1, False, difference=difference, dtype=dtype)
    return write_result("flux", "layer-level-against-head-level", decided, numbers, seed=0, out=out)


def _half_of_the_heads(sparse: Pattern, run: Pass, layer: int, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first half of the key heads dense, the others sparse, as two calls."""
    kv_half, half = k.shape[1] // 2, q.shape[1] // 2
    parts = []
    for part, kv_part, pattern in (
        (slice(0, half), slice(0, kv_half), Dense()),
        (slice(half, None), slice(kv_half, None), sparse),
    ):
        some_q, some_k, some_v = q[:, part], k[:, kv_part], v[:, kv_part]
        layout, _ = pattern.select(some_q, some_k, SelectContext(run.base, layer_index=layer))
        call = AttentionCall(some_q, some_k, some_v, layout, run.base, q.shape[-1] ** -0.5, return_lse=False)
        parts.append(compute(call)[0])
    return torch.cat(parts, 1)


def measure_router(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    lengths: tuple[int, ...] = (8192, 32768, 131072),
    dim: int = 1024,
    heads: int = 8,
    kv_heads: int = 8,
    pool: int = 100,
    sparse: Pattern = SPARSE,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``router-is-cheap``: a decision beside one layer at prefill, dense and sparse; its share of the dense layer is judged."""
    model = DecoderLM(VOCABULARY, dim, 1, heads, kv_heads).to(device, dtype).eval()
    routers, exact = _routers(dim // heads, pool, device)
    rows = {}
    for length in lengths:
        q, _, _ = gpu.drawn(heads, length, dim // heads, device, dtype)
        ids = torch.zeros(1, length, dtype=torch.long, device=device)
        x = torch.randn(1, length, dim, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        jobs: dict[str, Callable[[], Any]] = {
            "dense": partial(model.layers[0], x, model.begin(ids)),
            "sparse": partial(model.layers[0], x, model.begin(ids, sparse)),
            "router": partial(_decide, routers, q, model.begin(ids).base),
        }
        rows[str(length)] = gpu.timed(jobs, repeats, device)
    pooled = q.float().mean((1, 2))
    difference = float((routers.logits(0, pooled) - exact(pooled)).detach().abs().max())
    share = {length: row["ratio"]["router"] for length, row in rows.items()}
    longest = str(max(lengths))
    ms = rows[longest]["ms"]
    numbers = {
        "ours": f"{ms['router']:.3f} ms, {ms['router'] / ms['dense']:.4f} of a dense and {ms['router'] / ms['sparse']:.4f} of a sparse layer at {longest} tokens",
        "criterion": f"at most {LITTLE} of a dense layer at every length",
        "router_over_dense_layer": share,
        "difference": difference,
        "rows": rows,
    }
    decided = gpu.verdict(max(share.values()) <= LITTLE, share[longest] <= LITTLE, difference=difference, dtype=dtype)
    return write_result("flux", "router-is-cheap", decided, numbers, seed=0, out=out)


def _routers(head_dim: int, pool: int, device: str) -> tuple[Routers, torch.nn.Module]:
    """A random router as a file gives it, and the module that it was made from."""
    module = LayerRouters(1, head_dim, pool)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "routers.safetensors"
        module.save(file)
        return load_routers(str(file), file_sha256(file), device), module.layers[0].to(device)


@torch.no_grad()
def _decide(routers: Routers, q: Tensor, base: BaseMask) -> bool:
    logits = routers.logits(0, pooled_queries(q, routers.pool, prompt_spans(base, q.shape[0])))
    return bool((logits[:, 1] > logits[:, 0]).any())
