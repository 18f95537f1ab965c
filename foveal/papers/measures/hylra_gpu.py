"""HyLRA's claim about throughput: decoding with full, choosing and reusing layers beside dense decoding, on one GPU.

The roles are those that the paper's budgets give 28 layers, at even distances: 3 full, 9 that choose 2048 keys by their blocks'
means, and 16 that reuse them. Attention's shape is that of Qwen3-1.7B.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...core.base_mask import BaseMask
from ...core.budget import Budget
from ...core.context import SelectContext
from ...patterns.topk import BlockTopK
from ...policies.hylra import budgets, uniform_plan
from . import gpu
from .gpu_decode import Decoding
from .results import write_result

SHARE, GAIN = 0.6, 1.06


def measure_throughput(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    batch: int = 32,
    length: int = 32768,
    dim: int = 2048,
    depth: int = 28,
    heads: int = 16,
    kv_heads: int = 8,
    ratio: float = 3.0,
    kept: int = 2048,
    chunk: int = 128,
    repeats: int = gpu.REPEATS,
) -> dict[str, Any]:
    """Claim ``throughput-gain``: attention of all layers against the ratio of keys, and whole decode steps.

    Args:
        ratio: inner width of the MLP over ``dim``. kept: keys that a choosing layer keeps. chunk: keys per block.
    """
    full, changes = budgets(depth)
    plan = uniform_plan(depth, full, changes + 1 - full)
    choose = BlockTopK(Budget(tokens=kept), kv_block=chunk, per_head=False)
    policy = plan.policy(choose, dense_prefill=True)
    model = Decoding(dim, depth, heads, kv_heads, batch, length, device, dtype, ratio=ratio)
    states = model.states(policy)
    attention = gpu.timed(
        {"dense": partial(model.attention, None), "hylra": partial(model.attention, policy, states)}, repeats, device
    )
    steps = gpu.timed(
        {"dense": partial(model.step, None), "hylra": partial(model.step, policy, states)}, repeats, device
    )
    run = model.attention(policy, states, measuring=True)
    keys = [density.pairs // (batch * heads) for _, density in sorted(run.densities.items())]
    fewer = depth * length / sum(keys)
    faster, gain = 1 / attention["ratio"]["hylra"], 1 / steps["ratio"]["hylra"]
    cache, ctx = model.cache(0), SelectContext(BaseMask.build(1, length, causal=True, device=device))
    difference = gpu.pattern_error(choose, model.q, *cache, ctx)
    numbers = {
        "ours": f"attention {faster:.2f}× faster with {fewer:.2f}× fewer keys, whole steps {gain:.2f}×",
        "criterion": {"attention": round(SHARE * fewer, 4), "steps": GAIN},
        "fewer_keys": round(fewer, 4),
        "roles": {role: sum(plan.role(j) == role for j in range(depth)) for role in ("full", "compute", "reuse")},
        "keys_per_layer": keys,
        "tokens_per_second": {name: round(1e3 * batch / ms, 1) for name, ms in steps["ms"].items()},
        "attention": attention,
        "steps": steps,
        "difference": difference,
        "batch": batch,
        "keys": length,
    }
    decided = gpu.verdict(faster >= SHARE * fewer and gain >= GAIN, gain > 1, difference=difference, dtype=dtype)
    return write_result("hylra", "throughput-gain", decided, numbers, seed=0, out=out)
