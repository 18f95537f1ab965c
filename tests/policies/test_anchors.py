"""Anchors of reuse: every objective against all plans of small random matrices."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from foveal.core.errors import ConfigError, ShapeError
from foveal.policies.anchors import best_anchors, best_bottleneck, fewest_anchors, sources, value


def matrix(layers: int, seed: int, levels: int = 5) -> torch.Tensor:
    """Few levels, so that ties and equal bottlenecks are common."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randint(0, levels, (layers, layers), generator=g).double() / levels
    return a.fill_diagonal_(1.0)


def everything(layers: int, changes: int) -> list[tuple[int, ...]]:
    rest = range(1, layers)
    return [(0, *c) for n in range(min(changes, layers - 1) + 1) for c in itertools.combinations(rest, n)]


CASES = [(layers, seed % 5, seed) for layers in (1, 2, 4, 6, 9) for seed in range(12)]


@pytest.mark.parametrize(("layers", "changes", "seed"), CASES)
def test_two_phases_equal_brute_force_in_bottleneck_and_sum(layers, changes, seed):
    a = matrix(layers, seed)
    plans = [value(a, p) for p in everything(layers, changes)]
    found = best_anchors(a, changes)
    assert len(found) <= changes + 1 and found[0] == 0 and list(found) == sorted(set(found))
    assert value(a, found) == pytest.approx(max(plans))
    assert best_bottleneck(a, changes) == max(p[0] for p in plans)
    assert value(a, best_anchors(a, changes, "sum"))[1] == pytest.approx(max(p[1] for p in plans))


@pytest.mark.parametrize("seed", range(8))
def test_weights_count_in_the_sum(seed):
    a = matrix(6, seed)
    g = torch.Generator().manual_seed(seed)
    weights = torch.rand(6, generator=g).tolist()

    def total(p):
        return math.fsum(w * float(a[s, j]) for j, (s, w) in enumerate(zip(sources(p, 6), weights, strict=True)))

    found = best_anchors(a, 2, "sum", weights)
    assert total(found) == pytest.approx(max(total(p) for p in everything(6, 2)))


@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_fewest_anchors_for_a_threshold(threshold, seed):
    a = matrix(7, seed)
    good = [p for p in everything(7, 6) if value(a, p)[0] >= threshold]
    least = min(map(len, good))
    found = fewest_anchors(a, threshold)
    assert len(found) == least and value(a, found)[0] >= threshold
    assert value(a, found)[1] == pytest.approx(max(value(a, p)[1] for p in good if len(p) == least))


def test_one_pass_is_exact_in_the_bottleneck_and_not_in_the_sum():
    """The authors' programme keeps a prefix with a higher minimum that a later value makes irrelevant."""
    for seed in range(40):
        a = matrix(4 + seed % 4, seed)
        one, two = (value(a, best_anchors(a, 2, how)) for how in ("lexicographic", "bottleneck"))
        assert one[0] == two[0] and one[1] <= two[1] + 1e-12
    a = torch.eye(6, dtype=torch.float64)
    a[1, 2] = a[1, 3] = 0.5
    a[0, 1], a[2, 3] = 0.4, 1.0
    a[4, 5] = 0.3
    assert best_anchors(a, 2, "lexicographic") == (0, 1, 4) and best_anchors(a, 2) == (0, 2, 4)
    assert value(a, (0, 1, 4)) == pytest.approx((0.3, 4.3))
    assert value(a, (0, 2, 4)) == pytest.approx((0.3, 4.7))


def test_more_changes_never_lower_bottleneck_and_sum():
    for seed in range(20):
        a = matrix(8, seed)
        got = [value(a, best_anchors(a, c)) for c in range(9)]
        assert got == sorted(got) and got[-1] == (1.0, 8.0)


def test_identical_groups_are_found():
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    a = (groups[:, None] == groups).double()
    assert best_anchors(a, 2) == (0, 3, 5) and value(a, (0, 3, 5)) == (1.0, 9.0)


def test_all_layers_compute():
    a = matrix(6, 0) * 0.5
    a.fill_diagonal_(1.0)
    assert best_anchors(a, 5) == tuple(range(6)) and value(a, tuple(range(6))) == (1.0, 6.0)


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: best_anchors(torch.ones(2, 3), 1), r"shape \(2, 3\)"),
        (lambda: best_anchors(torch.zeros(0, 0), 1), "at least one layer"),
        (lambda: best_anchors(torch.eye(2) * 0.5, 1), "diagonal"),
        (lambda: best_anchors(torch.tensor([[1.0, 1.5], [0, 1]]), 1), "0 to 1"),
        (lambda: best_anchors(torch.tensor([[1.0, float("nan")], [0, 1]]), 1), "NaN"),
        (lambda: best_anchors(torch.eye(2), -1), "changes is -1"),
        (lambda: best_anchors(torch.eye(2), 1, "summ"), "Did you mean 'sum'"),
        (lambda: best_anchors(torch.eye(2), 1, weights=[1.0]), "2 finite numbers"),
        (lambda: fewest_anchors(torch.eye(2), 1.5), "threshold is 1.5"),
    ],
)
def test_bad_input(call, names):
    with pytest.raises((ConfigError, ShapeError), match=names):
        call()
