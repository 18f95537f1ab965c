"""HyLRA's count of keys: what full, compute and reuse layers attend to in decoding, counted and by formula.

A full layer attends to every key so far, a compute layer to the B best of them, a reuse layer to the same B without scoring:
``Σ_steps [ L_full·n + (L_compute + L_reuse)·min(B, n) ]`` per query head, with n keys at the step; scoring reads ``L_compute·n`` more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...core.budget import Budget
from ...models import DecoderLM, Memory
from ...patterns.dense import Dense
from ...patterns.reuse import Reuse
from ...patterns.token_topk import TokenTopK
from ...policies import Policy, Rule
from .results import write_result

ROLES = ("full", "compute", "reuse", "reuse", "compute", "reuse")
PROMPT, DECODED, BUDGETS, HEADS, KV_HEADS, SEED = 48, 80, (16, 64, 100), 4, 2, 0


def policy(budget: int) -> Policy:
    """Dense prefill; in decoding each layer plays its role."""
    decode = {"full": Dense(), "compute": TokenTopK(Budget(tokens=budget), local=0, sinks=0), "reuse": Reuse()}
    return Policy(layers=tuple((i, Rule(Dense(), decode[role])) for i, role in enumerate(ROLES)))


def counted(budget: int) -> list[int]:
    """Keys per query head that each layer attends to over all decoded tokens, from the selections."""
    model = DecoderLM(64, dim=32, depth=len(ROLES), num_heads=HEADS, num_kv_heads=KV_HEADS, seed=SEED).eval()
    make = torch.Generator().manual_seed(SEED)
    ids, memory, keys = torch.randint(64, (1, PROMPT), generator=make), Memory(), [0] * len(ROLES)
    with torch.no_grad():
        model(ids, policy(budget), memory)
        for _ in range(DECODED):
            ids = torch.randint(64, (1, 1), generator=make)
            run = model.begin(ids, policy(budget), memory, measuring=True)
            model(ids, run=run)
            for i, density in run.densities.items():
                keys[i] += density.pairs // HEADS
    return keys


def formula(budget: int, role: str) -> int:
    """The same in closed form."""
    lengths = range(PROMPT + 1, PROMPT + DECODED + 1)
    return sum(n if role == "full" else min(budget, n) for n in lengths)


def measure_keys(*, out: Path | None = None) -> dict[str, Any]:
    """Claim ``key-count-formula``."""
    found = {budget: counted(budget) for budget in BUDGETS}
    equal = all(keys == [formula(budget, role) for role in ROLES] for budget, keys in found.items())
    dense = formula(0, "full") * len(ROLES)
    first = sum(found[BUDGETS[0]])
    numbers = {
        "ours": f"{first} keys per head at a budget of {BUDGETS[0]}, {first / dense:.3f} of dense; formula {'equal' if equal else 'differs'}",
        "roles": list(ROLES),
        "keys": {str(budget): keys for budget, keys in found.items()},
        "formula": {str(budget): [formula(budget, role) for role in ROLES] for budget in BUDGETS},
        "dense": dense,
        "equal": equal,
    }
    return write_result(
        "hylra", "key-count-formula", "reproduced" if equal else "not reproduced", numbers, seed=SEED, out=out
    )
