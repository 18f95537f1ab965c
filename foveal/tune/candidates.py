"""What is measured: every pattern at several budgets, the same in all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.budget import Budget
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..patterns.dhsa import DHSA
from ..patterns.moba import MoBA
from ..patterns.sliding_window import SlidingWindow
from ..patterns.topk import BlockTopK
from ..patterns.triangle import Triangle
from ..patterns.xattention import XAttention
from ..policies.policy import Policy

SINKS = 4


@dataclass(frozen=True)
class Candidate:
    """A named policy to measure.

    Attributes:
        name: unique, shown in tables.
        policy: what runs.
        kind: ``"uniform"`` (one pattern in all layers), ``"per-layer"``, ``"routed"`` (decided for each prompt), or ``"baseline"``.
        method: how it was found: ``"uniform"``, ``"greedy"``, ``"hylra"``, ``"flux"``, ``"dense"``, or ``"control"`` for what is only
            compared with.
    """

    name: str
    policy: Policy
    kind: str = "uniform"
    method: str = "uniform"


def patterns(context: int) -> list[tuple[str, Pattern]]:
    """The patterns measured in all layers at a context length, each at budgets that can pay there.

    Budgets are shares of the context, so that the same list makes sense from a few hundred tokens to 128k.
    """
    quarter, eighth = max(1, context // 4), max(1, context // 8)
    return [
        (f"window {quarter}", SlidingWindow(quarter, SINKS)),
        (f"window {eighth}", SlidingWindow(eighth, SINKS)),
        ("block top-k 25 %", BlockTopK(budget=Budget(density=0.25))),
        ("block top-k 12.5 %", BlockTopK(budget=Budget(density=0.125))),
        ("dhsa vsb 25 %", DHSA(variant="vsb", budget=Budget(density=0.25))),
    ]


Proposal = Callable[[int], list[tuple[str, Pattern]]]
"""Context length → named patterns."""

FURTHER: dict[str, Proposal] = {
    "moba": lambda context: [
        (f"moba {share} %", MoBA(block=max(1, context // 32), top_k=top_k)) for share, top_k in (("25", 8), ("12.5", 4))
    ],
    "xattention": lambda context: [
        (f"xattention {share} %", XAttention(Budget(mass=share / 100))) for share in (95, 80)
    ],
    "triangle": lambda context: [
        ("triangle", Triangle(max(1, context // 8), sinks=64, dense_rows=128)),
    ],
    "dhsa_chunk": lambda context: [("dhsa chunks 25 %", DHSA(variant="chunk", budget=Budget(density=0.25)))],
}
"""Patterns measured when they are asked for: ``TuneOptions.patterns``. Shares of moba are of the blocks, of xattention of the mass."""


def further(names: Sequence[str], context: int) -> list[Candidate]:
    """Candidates of the patterns asked for, in the order of :data:`FURTHER`."""
    asked = [proposal(context) for name, proposal in FURTHER.items() if name in names]
    return [Candidate(name, Policy.uniform(pattern, name=name)) for some in asked for name, pattern in some]


def layer_options(context: int) -> list[Pattern]:
    """What the search may choose in a layer: dense first, then the patterns of :func:`patterns` and further budgets."""
    half, eighth, sixteenth = (max(1, context // n) for n in (2, 8, 16))
    more = [
        Triangle(eighth, sinks=64, dense_rows=128),
        SlidingWindow(half, SINKS),
        SlidingWindow(sixteenth, SINKS),
        BlockTopK(budget=Budget(density=0.5)),
        DHSA(variant="vsb", budget=Budget(density=0.5)),
    ]
    return [Dense(), *(pattern for _, pattern in patterns(context)), *more]


def uniform(context: int) -> list[Candidate]:
    """One candidate per proposed pattern."""
    return [Candidate(name, Policy.uniform(pattern, name=name)) for name, pattern in patterns(context)]


def dense_by(impl: str) -> Candidate:
    """Dense attention by one of foveal's own kernels: no loss, perhaps faster than the model's own."""
    name = f"dense ({impl})"
    return Candidate(name, Policy.uniform(Dense(), name=name), method="dense")


DENSE = Candidate("dense", Policy.uniform(Dense(), name="dense"), "baseline", "dense")
"""The model's own attention: chosen when nothing beats it."""
