"""SparseD's claims about time, on one GPU: steps of a small diffusion language model, and whole generations beside their prediction.

With t_d and t_s the times of a dense and of a sparse step and t_mask what making the mask adds to the step that makes it, a
generation of T steps with n_d dense and n_s sparse ones takes n_d·t_d + n_s·t_s + t_mask, and T·t_d when all are dense.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...bench.results import rounded
from ...core.base_mask import BaseMask
from ...core.context import SelectContext, State
from ...models import DiffusionLM
from ...patterns.sparsed import SparseD
from . import gpu
from .results import write_result

VOCABULARY = 256
LIMIT, WITHIN = 0.6, 0.1
LONG = 65536


def measure_latency(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    lengths: tuple[int, ...] = (16384, 32768, LONG),
    steps: int = 128,
    repeats: int = 3,
    **shape: int,
) -> dict[str, Any]:
    """Claim ``latency-64k``: the longest of ``lengths`` is judged; ``shape`` goes to :func:`generations`."""
    rows = {length: generations(length, steps, device, dtype, repeats, **shape) for length in lengths}
    difference = rows[min(lengths)]["difference"]
    worst = max(abs(row["predicted"] / row["generation"] - 1) for row in rows.values())
    crossed = [length for length, row in sorted(rows.items()) if row["generation"] < 1]
    last = rows[max(lengths)]
    numbers = {
        "ours": f"sparse over dense step {last['step']:.3f} at {max(lengths)} tokens, whole generation {last['generation']:.3f} (predicted "
        f"{last['predicted']:.3f}); faster than dense from {crossed[0] if crossed else 'no measured length'} on",
        "criterion": {"step": LIMIT, "prediction_within": WITHIN},
        "largest_error_of_prediction": round(worst, 4),
        "crossover": crossed[0] if crossed else None,
        "difference": difference,
        "steps": steps,
        "rows": {str(length): row for length, row in rows.items()},
    }
    good = last["step"] <= LIMIT and worst <= WITHIN
    decided = gpu.verdict(good, last["generation"] < 1, difference=difference, dtype=dtype)
    return write_result("sparsed", "latency-64k", decided, numbers, seed=0, out=out)


def measure_steps(
    *,
    out: Path | None = None,
    device: str = gpu.DEVICE,
    dtype: torch.dtype = gpu.DTYPE,
    length: int = LONG,
    steps: tuple[int, int] = (128, 1024),
    repeats: int = 3,
    **shape: int,
) -> dict[str, Any]:
    """Claim ``latency-1024-steps``: generations of both numbers of steps; the formula's error is judged on the larger one."""
    few, many = (generations(length, count, device, dtype, repeats, **shape) for count in steps)
    off = abs(many["predicted"] / many["generation"] - 1)
    gains = [1 / row["generation"] for row in (few, many)]
    numbers = {
        "ours": f"{gains[0]:.2f}× with {steps[0]} steps, {gains[1]:.2f}× with {steps[1]}; the formula is {100 * off:.1f} % off there",
        "criterion": WITHIN,
        "error_of_prediction": round(off, 4),
        "difference": few["difference"],
        "tokens": length,
        "rows": {str(count): row for count, row in zip(steps, (few, many), strict=True)},
    }
    more = gains[1] > gains[0]
    decided = gpu.verdict(more and off <= WITHIN, more, difference=few["difference"], dtype=dtype)
    return write_result("sparsed", "latency-1024-steps", decided, numbers, seed=0, out=out)


def generations(
    length: int,
    steps: int,
    device: str,
    dtype: torch.dtype,
    repeats: int,
    *,
    dim: int = 1024,
    depth: int = 8,
    heads: int = 8,
    answer: int = 128,
    block: int = 128,
    at_a_time: int = 32,
    checked: int = 2048,
) -> dict[str, Any]:
    """Sparse over dense: of one step, of a whole generation of ``steps`` steps, and as the formula predicts the latter.

    Args:
        length: prompt and ``answer`` tokens together. block: SparseD's. at_a_time: answer tokens that are filled together.
        checked: tokens, at most, of the call whose output is compared with dense attention under the same mask.
    """
    model = DiffusionLM(VOCABULARY, dim, depth, heads).to(device, dtype).eval()
    method = SparseD(steps=steps, generated=answer, block=block)
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    states: dict[int, State] = {}
    _step(model, ids, method, states, method.last_dense)
    jobs = {
        "dense": partial(_step, model, ids, None, None, 0),
        "mask": partial(_step, model, ids, method, None, method.last_dense),
        "sparse": partial(_step, model, ids, method, states, steps - 1),
    }
    row: dict[str, Any] = gpu.timed(jobs, repeats, device)
    ms, dense_steps = row["ms"], method.dense_steps
    making = max(ms["mask"] - ms["dense"], 0.0)
    predicted = (dense_steps * ms["dense"] + (steps - dense_steps) * ms["sparse"] + making) / (steps * ms["dense"])
    prompt, short = ids[:, :-answer], 4 * (answer // at_a_time)
    model.sample(prompt, answer, short, block=at_a_time, policy=replace(method, steps=short))  # compiles what it needs
    whole = {
        name: partial(model.sample, prompt, answer, steps, block=at_a_time, policy=policy)
        for name, policy in (("dense", None), ("sparse", method))
    }
    found = gpu.timed(whole, 1, device, warmup=0)
    return {
        "step": row["ratio"]["sparse"],
        "generation": found["ratio"]["sparse"],
        "predicted": rounded(predicted),
        "ms_of_a_step": ms,
        "ms_of_making_the_mask": making,
        "ms_of_a_generation": found["ms"],
        "dense_steps": dense_steps,
        "difference": _difference(method, min(length, checked), heads, dim // heads, device, dtype),
    }


@torch.inference_mode()
def _step(
    model: DiffusionLM, ids: Tensor, method: SparseD | None, states: dict[int, State] | None, step: int
) -> Tensor:
    return model(ids, run=model.begin(ids, method, states=states, step=step))


def _difference(method: SparseD, length: int, heads: int, head_dim: int, device: str, dtype: torch.dtype) -> float:
    q, k, v = gpu.drawn(heads, length, head_dim, device, dtype)
    ctx = SelectContext(BaseMask.build(length, length, causal=False, device=device))
    return gpu.pattern_error(method, q, k, v, ctx)
