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

KEPT = 0.22
"""Share of the keys that a choice keeps. Recent keys and sinks, kept in any case, raise it to about a quarter over a prefill, and a
tenth of the layers is dense: about a third of dense's keys in all."""


def choice(settings: ChunkSettings) -> BlockTopK:
    """What a computing layer keeps: the profile's chunks, by mean keys, one list per KV head."""
    return BlockTopK(
        Budget(density=KEPT), kv_block=settings.chunk, sinks=settings.sinks, local=settings.recent, per_head=False
    )


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
