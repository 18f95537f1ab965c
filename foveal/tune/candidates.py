"""What is measured: every pattern at several budgets, the same in all layers."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.budget import Budget
from ..patterns import Pattern
from ..patterns.dense import Dense
from ..patterns.dhsa import DHSA
from ..patterns.sliding_window import SlidingWindow
from ..patterns.topk import BlockTopK
from ..patterns.triangle import Triangle
from ..policies.policy import Policy

SINKS = 4


@dataclass(frozen=True)
class Candidate:
    """A named policy to measure.

    Attributes:
        name: unique, shown in tables.
        policy: what runs.
        kind: ``"uniform"`` (one pattern in all layers) or ``"per-layer"``.
    """

    name: str
    policy: Policy
    kind: str = "uniform"


def patterns(context: int) -> list[tuple[str, Pattern]]:
    """The patterns proposed at a context length, dense first.

    Budgets are shares of the context, so that the same list makes sense from a few hundred tokens to 128k.
    """
    half, quarter, eighth = (max(1, context // n) for n in (2, 4, 8))
    return [
        ("dense", Dense()),
        (f"window {half}", SlidingWindow(half, SINKS)),
        (f"window {quarter}", SlidingWindow(quarter, SINKS)),
        (f"window {eighth}", SlidingWindow(eighth, SINKS)),
        (f"triangle {quarter}", Triangle(quarter, sinks=64, dense_rows=128)),
        ("block top-k 50 %", BlockTopK(budget=Budget(density=0.5))),
        ("block top-k 25 %", BlockTopK(budget=Budget(density=0.25))),
        ("dhsa vsb 50 %", DHSA(variant="vsb", budget=Budget(density=0.5))),
        ("dhsa vsb 25 %", DHSA(variant="vsb", budget=Budget(density=0.25))),
    ]


def uniform(context: int) -> list[Candidate]:
    """One candidate per proposed pattern."""
    return [Candidate(name, Policy.uniform(pattern, name=name)) for name, pattern in patterns(context)]
