"""Graphs over electrodes or other nodes, as adjacencies: bool ``(N, N)``, entry ``[i, j]`` for an edge j → i, without self-loops."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import ConfigError, ShapeError


def full_graph(nodes: int) -> Tensor:
    """Every pair, both directions: ``nodes · (nodes − 1)`` edges."""
    return ~torch.eye(nodes, dtype=torch.bool)


def knn_graph(positions: Tensor, k: int) -> Tensor:
    """Each node hears its k nearest ones in space; ``positions`` ``(N, dimensions)``, such as a montage's.

    Raises:
        ConfigError: k outside 1 to N − 1.
    """
    return _strongest(-torch.cdist(positions, positions), k)


def correlation_graph(x: Tensor, k: int) -> Tensor:
    """Each node hears the k nodes whose signals correlate most with its own, by absolute value; ``x`` ``(…, N, T)``.

    Raises:
        ConfigError: k outside 1 to N − 1. ShapeError: fewer than two axes.
    """
    if x.dim() < 2:
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected (…, nodes, time).")
    signals = x.movedim(-2, 0).flatten(1)
    return _strongest(torch.corrcoef(signals).abs(), k)


def edges(adjacency: Tensor, graphs: int = 1) -> Tensor:
    """``(2, E)`` edge list, sources over targets, of ``graphs`` disjoint copies."""
    target, source = adjacency.nonzero(as_tuple=True)
    shift = torch.arange(graphs, device=adjacency.device).repeat_interleave(len(source)) * len(adjacency)
    return torch.stack([source, target]).repeat(1, graphs) + shift


def _strongest(score: Tensor, k: int) -> Tensor:
    n = len(score)
    if not 1 <= k < n:
        raise ConfigError(f"k is {k} for {n} nodes; expected 1 to {n - 1}.")
    score = score.masked_fill(torch.eye(n, dtype=torch.bool, device=score.device), -torch.inf)
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(k, 1).indices, True)
