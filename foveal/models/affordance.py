"""EEG-tGAT (arXiv 2604.10149): temporal convolutions, attention over time, graph attention over electrodes, one classifier.

``fusion="collapsed"`` is the released form: a convolution over electrodes leaves one vector, which is copied to all nodes. Identical
nodes make every attention weight 1/C, and neither the scoring vector nor W_r of the first graph layer gets a gradient: the graph does
nothing. ``fusion="per_node"`` (default) keeps the electrodes apart, which is what the paper describes; it is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.errors import ConfigError, ShapeError, UnsupportedError, nearest
from ..layers.gatv2 import GATv2
from ..layers.tgat import Mode, TemporalAttention, TemporalDropout

Fusion = Literal["per_node", "collapsed"]


@dataclass(frozen=True, eq=False)
class Looked:
    """``logits`` ``(B, K)``; ``curves``: importance of time, ``(B, T')`` or ``(B, C, T')``, None without temporal attention;
    ``edges``: α of both graph layers, ``(B, heads, C, C)`` each."""

    logits: Tensor
    curves: Tensor | None
    edges: tuple[Tensor, Tensor]


class EEGtGAT(nn.Module):
    """Classifier of EEG windows.

    Args:
        n_chans: C. n_times: T. n_outputs: classes. fusion: see the module.
        filters, kernels: of the temporal convolutions; even kernels make a window longer by one each.
        hidden: h of the graph layers. heads: of the first. dropout: of everything.
        dropout_mode: see :class:`~foveal.layers.tgat.TemporalDropout`; ``"feature_map"`` as released.
        temporal_attention: False averages over time.
        adjacency: bool ``(C, C)``, see :mod:`foveal.layers.graphs`; default the complete graph. Self-loops are added.

    Raises:
        ConfigError: an unknown fusion, or sizes that do not go together.
    """

    adjacency: Tensor | None

    def __init__(
        self,
        n_chans: int,
        n_times: int,
        n_outputs: int,
        *,
        fusion: Fusion = "per_node",
        filters: tuple[int, ...] = (30, 60, 90),
        kernels: tuple[int, ...] = (128, 64, 32),
        hidden: int = 64,
        heads: int = 2,
        dropout: float = 0.1,
        dropout_mode: Mode = "feature_map",
        temporal_attention: bool = True,
        adjacency: Tensor | None = None,
    ) -> None:
        super().__init__()
        if fusion not in ("per_node", "collapsed"):
            raise ConfigError(f"EEGtGAT.fusion is {fusion!r}. {nearest(str(fusion), ('per_node', 'collapsed'))}")
        if not filters or len(filters) != len(kernels):
            raise ConfigError(
                f"EEGtGAT has {len(filters)} filters and {len(kernels)} kernels; expected as many, at least one."
            )
        self.n_chans, self.n_times, self.fusion = n_chans, n_times, fusion
        inputs = (1, *filters)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, (1, k), padding=(0, k // 2)) for a, b, k in zip(inputs, filters, kernels, strict=False)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(f) for f in filters)
        self.act = nn.PReLU()  # one for the whole network
        self.time_dropout = TemporalDropout(dropout, dropout_mode)
        width = filters[-1]
        self.collapse = None
        if fusion == "collapsed":
            over_electrodes = nn.Conv2d(width, width, (n_chans, 1), groups=width, bias=False)
            self.collapse = nn.Sequential(over_electrodes, nn.BatchNorm2d(width))
        self.attention = TemporalAttention(width) if temporal_attention else None
        self.graph1 = GATv2(width, hidden, heads, dropout=dropout)
        self.graph2 = GATv2(heads * hidden, hidden, 1, concat=False, dropout=dropout)
        self.norm1, self.norm2 = nn.LayerNorm(heads * hidden), nn.LayerNorm(hidden)
        self.head = nn.Sequential(nn.Linear(hidden, 64), nn.ELU(), nn.Dropout(dropout), nn.Linear(64, n_outputs))
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, n_outputs)`` logits of windows ``(B, C, T)``.

        Raises:
            ShapeError: another shape.
        """
        return self.look(x).logits

    def look(self, x: Tensor) -> Looked:
        """The logits with what the model attended to."""
        if x.dim() != 3 or tuple(x.shape[1:]) != (self.n_chans, self.n_times):
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected (batch, {self.n_chans} electrodes, {self.n_times} samples)."
            )
        nodes, curves = self._nodes(x[:, None])
        out, first = self.graph1.dense(nodes, self.adjacency)
        out, second = self.graph2.dense(self.act(self.norm1(out)), self.adjacency)
        return Looked(self.head(self.act(self.norm2(out)).mean(1)), curves, (first, second))

    def forward_graph(self, x: Tensor, edge_index: Tensor, batch: Tensor, graphs: int) -> Tensor:
        """Logits ``(graphs, n_outputs)`` of graphs of any size, as edge lists.

        Args:
            x: ``(nodes, T)``, one signal per node. edge_index: ``(2, E)``, sources over targets.
            batch: ``(nodes,)``, the graph of each node. graphs: their number, so that an empty last one is not lost.

        Raises:
            UnsupportedError: the collapsed form, which needs all electrodes. ShapeError: another length.
        """
        if self.collapse is not None:
            raise UnsupportedError(
                'EEGtGAT with fusion="collapsed" has a convolution over all electrodes; use fusion="per_node" for edge lists.'
            )
        if x.dim() != 2 or x.shape[1] != self.n_times or batch.shape != x.shape[:1]:
            raise ShapeError(
                f"x has shape {tuple(x.shape)} and batch {tuple(batch.shape)}; expected (nodes, {self.n_times}) and (nodes,)."
            )
        nodes = self._nodes(x[:, None, None])[0][:, 0]
        out = self.act(self.norm1(self.graph1(nodes, edge_index)))
        out = self.act(self.norm2(self.graph2(out, edge_index)))
        total = out.new_zeros(graphs, out.shape[1]).index_add(0, batch, out)
        count = torch.bincount(batch, minlength=graphs).clamp(min=1)
        return self.head(total / count[:, None])

    def _nodes(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(B, C, F)`` features of the nodes from ``(B, 1, C, T)``, and the curves."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.time_dropout(self.act(norm(conv(x))))
        batch, _, electrodes, _ = x.shape
        if self.collapse is not None:
            x = self.act(self.collapse(x))
        series = x.transpose(1, 2).flatten(0, 1)  # (B·C or B, F, T')
        features, curves = series.mean(-1), None
        if self.attention is not None:
            features, curves = self.attention.average(series)
        if self.collapse is not None:
            return features[:, None].expand(-1, self.n_chans, -1), curves
        return features.view(batch, electrodes, -1), None if curves is None else curves.view(batch, electrodes, -1)
