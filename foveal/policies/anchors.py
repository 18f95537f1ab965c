"""Which layers choose keys and which follow them: exact plans from a matrix of overlaps (HyLRA, arXiv 2602.00777).

``A[i, j]`` says how well layer ``j`` does with the choice of layer ``i ≤ j``; the diagonal is 1. Anchors ``0 = a_0 < a_1 < …``
choose, and every other layer follows the latest anchor before it. The value of a layer is ``A[its anchor, layer]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError, nearest

Objective = Literal["bottleneck", "lexicographic", "sum"]
OBJECTIVES: tuple[Objective, ...] = ("bottleneck", "lexicographic", "sum")


def best_anchors(
    overlap: Tensor, changes: int, objective: Objective = "bottleneck", weights: Sequence[float] | None = None
) -> tuple[int, ...]:
    """At most ``changes + 1`` anchors.

    Args:
        overlap: ``(L, L)`` values from 0 to 1, of which the upper triangle is read; the diagonal is 1.
        changes: how often, after layer 0, a layer may choose anew.
        objective: ``"bottleneck"``, the largest smallest value and among such plans the largest sum, exact in both (two phases);
            ``"lexicographic"``, the authors' one pass over (smallest, sum), exact in the smallest value only; ``"sum"``, the largest
            sum (Kascade's).
        weights: importance of each layer in the sum; default 1.

    Raises:
        ShapeError, ConfigError: a matrix, number or name that cannot be used.
    """
    a = _checked(overlap)
    if isinstance(changes, bool) or not isinstance(changes, int) or changes < 0:
        raise ConfigError(f"changes is {changes!r}; expected a whole number of at least 0: layer 0 always chooses.")
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective is {objective!r}. {nearest(str(objective), OBJECTIVES)}")
    importance = _weights(weights, len(a))
    most = min(changes + 1, len(a))
    if objective == "lexicographic":
        return _one_pass(a, most, importance)
    threshold = -math.inf if objective == "sum" else best_bottleneck(overlap, changes)
    found = _largest_sum(a, most, threshold, importance)
    assert found is not None
    return found


def best_bottleneck(overlap: Tensor, changes: int) -> float:
    """Phase 1: the largest smallest value that at most ``changes + 1`` anchors reach, by halving over the entries."""
    a = _checked(overlap)
    levels = sorted({a[i][j] for i in range(len(a)) for j in range(i, len(a))})
    low, high = 0, len(levels) - 1  # the smallest entry is always reached
    while low < high:
        middle = (low + high + 1) // 2
        if len(_cover(a, levels[middle])) <= changes + 1:
            low = middle
        else:
            high = middle - 1
    return levels[low]


def fewest_anchors(overlap: Tensor, threshold: float, weights: Sequence[float] | None = None) -> tuple[int, ...]:
    """As few anchors as give every layer at least ``threshold``; of such plans the one with the largest sum."""
    a = _checked(overlap)
    if not 0.0 <= threshold <= 1.0:
        raise ConfigError(f"threshold is {threshold!r}; expected a value from 0 to 1: an anchor's own value is 1.")
    found = _largest_sum(a, len(_cover(a, threshold)), threshold, _weights(weights, len(a)))
    assert found is not None
    return found


def sources(anchors: Sequence[int], layers: int) -> tuple[int, ...]:
    """For every layer its anchor; an anchor is its own."""
    return tuple(max(a for a in anchors if a <= j) for j in range(layers))


def value(overlap: Tensor, anchors: Sequence[int]) -> tuple[float, float]:
    """Smallest value of a plan, and the sum over layers."""
    values = [float(overlap[a, j]) for j, a in enumerate(sources(anchors, len(overlap)))]
    return min(values), math.fsum(values)


def _checked(overlap: Tensor) -> list[list[float]]:
    if overlap.dim() != 2 or overlap.shape[0] != overlap.shape[1] or not len(overlap):
        raise ShapeError(
            f"overlap has shape {tuple(overlap.shape)}; expected (layers, layers) with at least one layer."
        )
    upper = overlap.detach().double().cpu().triu()
    if not bool(torch.isfinite(upper).all()) or float(upper.min()) < 0 or float(upper.max()) > 1:
        raise ConfigError("overlap has entries that are not from 0 to 1; expected shares of selected keys without NaN.")
    if not bool((upper.diagonal() == 1).all()):
        raise ConfigError("overlap has a diagonal other than 1; expected 1: a layer agrees with itself.")
    return upper.tolist()


def _weights(weights: Sequence[float] | None, layers: int) -> list[float]:
    if weights is None:
        return [1.0] * layers
    if len(weights) != layers or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ConfigError(
            f"weights is {list(weights)!r}; expected {layers} finite numbers of at least 0, one per layer."
        )
    return [float(w) for w in weights]


def _reach(a: list[list[float]], i: int, threshold: float) -> int:
    """One past the last layer up to which anchor ``i`` keeps the threshold without a gap."""
    end = i
    while end < len(a) and a[i][end] >= threshold:
        end += 1
    return end


def _cover(a: list[list[float]], threshold: float) -> list[int]:
    """The fewest anchors for a threshold, greedily: of the anchors that leave no gap, the one that reaches furthest."""
    ends = [_reach(a, i, threshold) for i in range(len(a))]
    anchors = [0]
    while ends[anchors[-1]] < len(a):
        anchors.append(max(range(anchors[-1] + 1, ends[anchors[-1]] + 1), key=lambda i: ends[i]))
    return anchors


def _largest_sum(a: list[list[float]], most: int, threshold: float, weights: list[float]) -> tuple[int, ...] | None:
    """Phase 2: the largest weighted sum over at most ``most`` runs in which every value reaches the threshold; O(L²·most)."""
    layers = len(a)
    best = [0.0] + [-math.inf] * layers  # of the layers before j, with the runs used so far
    back: list[list[int]] = []
    ends: list[float] = []
    for _ in range(most):
        grown, came = [-math.inf] * (layers + 1), [0] * (layers + 1)
        for start in range(layers):
            total = best[start]
            if total == -math.inf:
                continue
            for j in range(start, _reach(a, start, threshold)):
                total += weights[j] * a[start][j]
                if total > grown[j + 1]:
                    grown[j + 1], came[j + 1] = total, start
        best = grown
        back.append(came)
        ends.append(best[layers])
    runs = max(range(most), key=lambda r: ends[r])
    if ends[runs] == -math.inf:
        return None
    anchors, end = [], layers
    for came in reversed(back[: runs + 1]):
        end = came[end]
        anchors.append(end)
    return tuple(reversed(anchors))


def _one_pass(a: list[list[float]], most: int, weights: list[float]) -> tuple[int, ...]:
    """The authors' programme: per column, anchor and number of anchors the best (smallest, sum) is kept, which may lose sum."""
    State = tuple[float, float, tuple[int, ...]]
    states: dict[tuple[int, int], State] = {(0, 1): (1.0, weights[0], (0,))}
    for j in range(1, len(a)):
        grown: dict[tuple[int, int], State] = {}
        for (i, used), (low, total, anchors) in states.items():
            steps = [((i, used), (min(low, a[i][j]), total + weights[j] * a[i][j], anchors))]
            if used < most:
                steps.append(((j, used + 1), (low, total + weights[j], (*anchors, j))))
            for key, state in steps:
                if key not in grown or state[:2] > grown[key][:2]:
                    grown[key] = state
        states = grown
    return max(states.values(), key=lambda s: s[:2])[2]
