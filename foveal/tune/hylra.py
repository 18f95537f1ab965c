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

KEPT = 0.25
"""Share of the keys that a choice keeps: with a tenth of the layers dense, about a third of dense's keys in all."""


def choice(settings: ChunkSettings) -> BlockTopK:
    """What a computing layer keeps: the profile's chunks, by mean keys, one list per KV head."""
    return BlockTopK(
        Budget(density=KEPT), kv_block=settings.chunk, sinks=settings.sinks, local=settings.recent, per_head=False
    )


def hylra_candidates(
    meter: Meter, ids: Tensor, journal: Journal, tick: Callable[[str], None], how: HyLRA | None = None
) -> tuple[list[Candidate], dict[str, Any]]:
    """Profile the search text ``(1, N)``, plan, and return ``hylra`` and ``even spacing``, with what the report keeps of them."""
    how = HyLRA() if how is None else how
    settings = ChunkSettings.at(ids.shape[1], KEPT)
    if "hylra.profile" not in journal:
        found = profile(meter.model, ids, settings, lambda done: tick(f"measured chunks of layer {done - 1}"))
        journal.put("hylra.profile", found.to_json())
    found = ReuseProfile.from_json(journal["hylra.profile"])
    plan = how.plan(found)
    roles = [plan.role(j) for j in range(len(plan.reuse))]
    even = uniform_plan(len(roles), roles.count("full"), roles.count("compute"), plan.classes)
    proposed = [_candidate("hylra", plan, settings), _candidate("even spacing", even, settings)]
    return proposed, {
        "plan": plan.to_json(),
        "even": even.to_json(),
        "settings": vars(settings),
        "profile": found.to_json(),
    }


def _candidate(name: str, plan: Plan, settings: ChunkSettings) -> Candidate:
    return Candidate(name, plan.policy(choice(settings), name=name), "per-layer")
