"""GATv2 (arXiv 2105.14491): attention of a node over its neighbours, with a ranking that depends on the node.

For an edge j → i: e_ij = aᵀ·LeakyReLU(W_r·x_i + W_l·x_j [+ W_e·ε_ij]); α_ij = softmax over the sources j of each target i;
x'_i = Σ_j α_ij·W_l·x_j + b, per head. Constructor, weights and results are those of PyTorch Geometric's ``GATv2Conv``, without that
library. :meth:`GATv2.dense` computes batches of equal graphs without edge lists.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, nearest

Fill = Literal["mean", "add", "min", "max", "mul"]
_REDUCE = {"mean": "mean", "add": "sum", "min": "amin", "max": "amax", "mul": "prod"}


class GATv2(nn.Module):
    """One graph attention layer.

    Args:
        in_channels: features of a node; a pair for sources and targets of a bipartite graph.
        out_channels: features per head. heads: their number. concat: heads side by side; otherwise their mean.
        negative_slope: of LeakyReLU. dropout: share of the weights α dropped in training, after the softmax.
        add_self_loops: replace self-loops by one per node. edge_dim: features of an edge. fill_value: features of the added loops:
            a number, a tensor, or how they follow from a node's incoming edges.
        bias, share_weights, residual: as named; ``share_weights`` makes W_r = W_l.

    Raises:
        ConfigError: sizes below 1, or an unknown ``fill_value``.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        edge_dim: int | None = None,
        fill_value: float | Tensor | Fill = "mean",
        bias: bool = True,
        share_weights: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        sources, targets = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        if min(sources, targets, out_channels, heads) < 1 or not 0 <= dropout <= 1:
            raise ConfigError(
                f"GATv2 has in_channels={in_channels}, out_channels={out_channels}, heads={heads}, dropout={dropout}; expected sizes of at least 1 and a dropout from 0 to 1."
            )
        if isinstance(fill_value, str) and fill_value not in _REDUCE:
            raise ConfigError(f"GATv2.fill_value is {fill_value!r}. {nearest(fill_value, _REDUCE)}")
        if share_weights and sources != targets:
            raise ConfigError(
                f"GATv2.share_weights needs equal in_channels, and they are {in_channels}; leave it False."
            )
        self.out_channels, self.heads, self.concat = out_channels, heads, concat
        self.negative_slope, self.dropout, self.add_self_loops = negative_slope, dropout, add_self_loops
        self.fill_value = fill_value
        self.lin_l = _linear(sources, heads * out_channels, bias)
        self.lin_r = self.lin_l if share_weights else _linear(targets, heads * out_channels, bias)
        self.att = nn.Parameter(torch.empty(1, heads, out_channels))
        nn.init.xavier_uniform_(self.att)
        self.lin_edge = None if edge_dim is None else _linear(edge_dim, heads * out_channels, False)
        total = out_channels * (heads if concat else 1)
        self.res = _linear(targets, total, False) if residual else None
        self.bias = nn.Parameter(torch.zeros(total)) if bias else None

    def forward(
        self,
        x: Tensor | tuple[Tensor, Tensor],
        edge_index: Tensor,
        edge_attr: Tensor | None = None,
        return_attention_weights: bool | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """Attend along a list of edges.

        Args:
            x: ``(N, in_channels)``, or a pair for sources ``(N_l, …)`` and targets ``(N_r, …)``.
            edge_index: ``(2, E)`` int64, sources over targets. edge_attr: ``(E, edge_dim)``, or ``(E,)`` for one feature.
            return_attention_weights: also return the edges used, with self-loops, and α ``(E', heads)``.

        Returns:
            ``(N_r, out)``; a target without edges gets the bias alone.

        Raises:
            ShapeError: shapes that do not fit the layer, or edges to nodes that are not there.
        """
        left, right = x if isinstance(x, tuple) else (x, x)
        self._check(left, right, edge_index, edge_attr)
        if edge_attr is not None and edge_attr.dim() == 1:
            edge_attr = edge_attr[:, None]
        if self.add_self_loops:
            edge_index, edge_attr = self._loops(edge_index, edge_attr, min(len(left), len(right)))
        source, target = edge_index
        values, queries = self._heads(self.lin_l(left)), self._heads(self.lin_r(right))
        inner = queries[target] + values[source]
        if edge_attr is not None and self.lin_edge is not None:
            inner = inner + self._heads(self.lin_edge(edge_attr))
        scores = (nn.functional.leaky_relu(inner, self.negative_slope) * self.att).sum(-1)  # (E, heads)
        share = softmax_by(scores, target, len(right))
        share = nn.functional.dropout(share, self.dropout, self.training)
        out = values.new_zeros(len(right), self.heads, self.out_channels)
        out = out.index_add(0, target, values[source] * share[..., None].to(values.dtype))
        result = self._finish(out, right)
        return (result, (edge_index, share)) if return_attention_weights else result

    def dense(self, x: Tensor, adjacency: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Attend in a batch of graphs of N nodes each.

        Args:
            x: ``(B, N, in_channels)``.
            adjacency: bool ``(N, N)`` or ``(B, N, N)``, entry ``[i, j]`` for an edge j → i; default complete graphs. Self-loops
                follow ``add_self_loops``: all of them, or those of the adjacency.

        Returns:
            ``(B, N, out)`` and α before dropout ``(B, heads, N targets, N sources)``; zeros where a target has no edges.

        Raises:
            ShapeError: shapes that do not fit. ConfigError: a layer with ``edge_dim``.
        """
        if self.lin_edge is not None:
            raise ConfigError("GATv2.dense has no edge features; call the layer with edge_index and edge_attr.")
        if x.dim() != 3 or x.shape[-1] != self.lin_l.in_features or self.lin_r.in_features != self.lin_l.in_features:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, nodes, {self.lin_l.in_features}).")
        n = x.shape[1]
        seen = torch.ones(n, n, dtype=torch.bool, device=x.device) if adjacency is None else adjacency
        if seen.dtype != torch.bool or seen.shape not in ((n, n), (len(x), n, n)):
            raise ShapeError(
                f"adjacency is {seen.dtype} of shape {tuple(seen.shape)}; expected bool ({n}, {n}) or ({len(x)}, {n}, {n})."
            )
        if self.add_self_loops:
            seen = seen | torch.eye(n, dtype=torch.bool, device=x.device)
        values, queries = self._heads(self.lin_l(x)), self._heads(self.lin_r(x))  # (B, N, heads, D)
        inner = nn.functional.leaky_relu(queries[:, :, None] + values[:, None], self.negative_slope)
        scores = (inner * self.att).sum(-1).permute(0, 3, 1, 2)  # (B, heads, targets, sources)
        hidden = ~(seen[:, None] if seen.dim() == 3 else seen)
        alone = hidden.all(-1, keepdim=True)
        share = torch.softmax(scores.masked_fill(hidden & ~alone, -torch.inf), -1)
        share = share.masked_fill(alone, 0)
        dropped = nn.functional.dropout(share, self.dropout, self.training)
        out = torch.einsum("bhij,bjhd->bihd", dropped.to(values.dtype), values)
        return self._finish(out, x), share

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.out_channels))

    def _finish(self, out: Tensor, right: Tensor) -> Tensor:
        joined = out.flatten(-2) if self.concat else out.mean(-2)
        if self.res is not None:
            joined = joined + self.res(right)
        return joined if self.bias is None else joined + self.bias

    def _loops(self, edge_index: Tensor, edge_attr: Tensor | None, nodes: int) -> tuple[Tensor, Tensor | None]:
        other = edge_index[0] != edge_index[1]
        edge_index = edge_index[:, other]
        loops = torch.arange(nodes, device=edge_index.device)
        if edge_attr is not None:
            edge_attr = edge_attr[other]
            fill = self.fill_value
            if isinstance(fill, str):
                into = edge_index[1][:, None].expand_as(edge_attr)
                own = edge_attr.new_zeros(max(nodes, _top(edge_index)), edge_attr.shape[1])
                own = own.scatter_reduce(0, into, edge_attr, _REDUCE[fill], include_self=False)[:nodes]
            elif isinstance(fill, Tensor):
                own = fill.to(edge_attr).expand(nodes, edge_attr.shape[1])
            else:
                own = edge_attr.new_full((nodes, edge_attr.shape[1]), fill)
            edge_attr = torch.cat([edge_attr, own])
        return torch.cat([edge_index, loops.expand(2, -1)], 1), edge_attr

    def _check(self, left: Tensor, right: Tensor, edge_index: Tensor, edge_attr: Tensor | None) -> None:
        for name, nodes, wanted in (("source", left, self.lin_l), ("target", right, self.lin_r)):
            if nodes.dim() != 2 or nodes.shape[1] != wanted.in_features:
                raise ShapeError(
                    f"{name} nodes have shape {tuple(nodes.shape)}; expected (nodes, {wanted.in_features})."
                )
        if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
            raise ShapeError(
                f"edge_index is {edge_index.dtype} of shape {tuple(edge_index.shape)}; expected int64 (2, edges)."
            )
        if edge_index.numel() and not torch.compiler.is_compiling():
            low, high = int(edge_index.min()), edge_index.amax(1).tolist()
            if low < 0 or high[0] >= len(left) or high[1] >= len(right):
                raise ShapeError(
                    f"edge_index names nodes from {low} to {high[0]} (sources) and {high[1]} (targets); there are {len(left)} and {len(right)}."
                )
        wanted_edges = None if self.lin_edge is None else self.lin_edge.in_features
        if (edge_attr is None) != (wanted_edges is None):
            raise ShapeError(
                f"edge_attr is {'missing' if edge_attr is None else 'given'} and the layer has edge_dim={wanted_edges}; give both or neither."
            )
        if edge_attr is not None:
            shape = (len(edge_attr), 1) if edge_attr.dim() == 1 else tuple(edge_attr.shape)
            if shape != (edge_index.shape[1], wanted_edges):
                raise ShapeError(
                    f"edge_attr has shape {tuple(edge_attr.shape)}; expected ({edge_index.shape[1]}, {wanted_edges})."
                )

    def extra_repr(self) -> str:
        return f"heads={self.heads}, concat={self.concat}, dropout={self.dropout}"


def softmax_by(scores: Tensor, group: Tensor, groups: int) -> Tensor:
    """Softmax of ``(E, H)`` scores inside each group of equal ``group`` ``(E,)``, in float32 or wider."""
    wide = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    index = group[:, None].expand_as(wide)
    top = wide.new_full((groups, wide.shape[1]), -torch.inf).scatter_reduce(0, index, wide.detach(), "amax")
    exponent = (wide - top[group]).exp()
    total = wide.new_zeros(groups, wide.shape[1]).index_add(0, group, exponent)
    return (exponent / total[group]).to(scores.dtype)


def _top(edge_index: Tensor) -> int:
    return int(edge_index[1].max()) + 1 if edge_index.numel() else 0


def _linear(inputs: int, outputs: int, bias: bool) -> nn.Linear:
    """With Glorot's uniform weights and a bias of zeros."""
    made = nn.Linear(inputs, outputs, bias)
    nn.init.xavier_uniform_(made.weight)
    if bias:
        nn.init.zeros_(made.bias)
    return made
