"""``foveal tune --method hylra``: a policy planned from one profile, beside even spacing at the same density."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..core.budget import Budget
from ..lens.chunks import ChunkSettings
from ..patterns.topk import BlockTopK
from ..policies.hylra import HyLRA, Plan, ReuseProfile, profile, uniform_plan
from .candidates import Candidate
from .journal import Journal
from .meter import Meter

KEPT = 0.26
"""Share of the keys that a choice keeps. Recent keys, kept in any case, raise it a little over a prefill, and a tenth of the layers is
dense: about 34 % of dense's keys in all."""


def choice(settings: ChunkSettings) -> BlockTopK:
    """What a computing layer keeps: for every query head its own blocks by mean keys, a quarter of the profile's chunk long.

    The mean of a whole chunk, one list for all heads of a group, says too little about the keys in it.
    """
    return BlockTopK(
        Budget(density=KEPT), q_block=max(1, settings.chunk // 2), kv_block=max(1, settings.chunk // 4), local=settings.recent
    )  # fmt: skip


def plans(found: ReuseProfile, how: HyLRA | None = None) -> dict[str, Plan]:
    """``hylra``, planned from the profile, and ``even spacing`` with as many layers of each role."""
    plan = (HyLRA() if how is None else how).plan(found)
    roles = [plan.role(j) for j in range(len(plan.reuse))]
    even = uniform_plan(len(roles), roles.count("full"), roles.count("compute"), plan.classes)
    return {"hylra": plan, "even spacing": even}


def hylra_candidates(
    meter: Meter, ids: Tensor, journal: Journal, tick: Callable[[str], None]
) -> tuple[list[Candidate], dict[str, Any]]:
    """Profile the search text ``(1, N)`` and plan: the candidates of :func:`plans`, and what the results keep of them."""
    settings = ChunkSettings.at(ids.shape[1], KEPT)
    if "hylra.profile" not in journal:
        found = profile(meter.model, ids, settings, lambda done: tick(f"measured chunks of layer {done - 1}"))
        journal.put("hylra.profile", found.to_json())
    found = ReuseProfile.from_json(journal["hylra.profile"])
    made = plans(found)
    proposed = [
        Candidate(
            name, plan.policy(choice(settings), name=name), "per-layer", "hylra" if name == "hylra" else "control"
        )
        for name, plan in made.items()
    ]
    kept = {"plans": {name: plan.to_json() for name, plan in made.items()}, "settings": vars(settings)}
    return proposed, {**kept, "profile": found.to_json()}
