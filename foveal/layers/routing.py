"""Routing attention (arXiv 2003.05997): each head attends inside clusters of tokens that online k-means finds.

Queries and keys are layer-normalised without scale and bias, so every token has norm √d and the nearest centroid is the
one with the largest product. Two memberships:

``"strict"`` (ours, for language models): a token belongs to one cluster, that of its largest product, and sees itself and the
last ``window − 1`` earlier members. Strictly causal; decoding equals training.
``"paper"``: every centroid takes its ``window`` nearest tokens of the whole sequence; a token may be in several clusters (their
outputs are averaged) or in none (zeros). Values are causal, the selection is not: later tokens can push earlier ones out.

The centroids are a state that goes in and comes out. Update (training only): moving averages of counts and sums of the tokens
of each cluster, μ = sum / count; a loss β·‖x − μ‖² pulls tokens to their centroid. Not taken over from the authors' code: its
relative-position embeddings by rank inside a cluster; use ``rotary``, which turns after the clusters are found.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..core.base_mask import EMPTY, FULL, BaseMask
from ..core.errors import ConfigError, ShapeError, UnsupportedError, nearest
from ..core.layouts import Groups, KeySelection, Layout, block_mask
from ..core.serial import check_sizes
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..patterns.clusters import cluster_band, flat_members, last_members
from .kmeans import Centroids, assign, clustering_loss, nearest_tokens, normalise, update
from .rotary import rotary, rotate

Mode = Literal["strict", "paper"]


@dataclass
class RoutingMemory:
    """What a causal layer remembers of a request: per head normalised queries, keys and values ``(B, H, n, D)``."""

    routed: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Routed:
    """Result of one call: ``out`` ``(B, N, dim)``, the new ``state``, the clustering ``loss`` (β included), and ``coverage``,
    the share of tokens in at least one cluster."""

    out: Tensor
    state: Centroids
    loss: Tensor
    coverage: float


def _check_number(name: str, value: float, low: float, below: float) -> None:
    """Raise :class:`ConfigError` unless ``value`` is a finite number from ``low`` to below ``below``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < below or value == -math.inf:
        span = "" if low == -math.inf else f" of at least {low}" + ("" if below == math.inf else f" and below {below}")
        raise ConfigError(f"RoutingAttention.{name} is {value!r}; expected a finite number{span}.")


class RoutingAttention(nn.Module):
    """Self-attention with routing heads and local heads.

    Args:
        dim: width. num_heads: of all heads. local_heads: how many of them are local: each block of ``local_block`` tokens sees
            itself and the block before it (and, without ``causal``, the one after).
        clusters: centroids per routing head. window: w, members that a token may see, itself included; about N / clusters.
        causal: for language models; queries then are their own keys (shared QK) in the routing heads.
        mode: see the module's docstring; ``"strict"`` needs ``causal``.
        scale: factor of q·k; None means 1/√D. The authors' code has 1.0, which lets a token's own logit D dominate.
        mask_self: a token does not see itself; one that sees nothing else gives zeros.
        count_offset: added to a token's number of clusters in the average; the authors' code has 0.01, which shrinks outputs.
        rotary: turn queries and keys by position after the clusters are found.
        beta: weight of the clustering loss. decay: of the moving averages.
        mix_heads: one more linear map over the heads before the output projection, as in the authors' code.

    Raises:
        ConfigError: sizes or a mode that do not go together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        local_heads: int = 0,
        *,
        clusters: int = 8,
        window: int = 128,
        causal: bool = True,
        mode: Mode = "strict",
        local_block: int = 128,
        scale: float | None = None,
        mask_self: bool = False,
        count_offset: float = 0.0,
        rotary: bool = True,
        beta: float = 1e-4,
        decay: float = 0.999,
        mix_heads: bool = False,
    ) -> None:
        super().__init__()
        if mode not in ("strict", "paper"):
            raise ConfigError(f"RoutingAttention.mode is {mode!r}. {nearest(str(mode), ('strict', 'paper'))}")
        if mode == "strict" and not causal:
            raise ConfigError(
                "RoutingAttention.mode is 'strict' with causal=False; expected mode='paper', which sees both sides."
            )
        check_sizes(self, dim=dim, num_heads=num_heads, clusters=clusters, window=window, local_block=local_block)
        check_sizes(self, 0, local_heads=local_heads)
        for name, value, below in (
            ("count_offset", count_offset, math.inf),
            ("beta", beta, math.inf),
            ("decay", decay, 1),
        ):
            _check_number(name, value, 0, below)
        if scale is not None:
            _check_number("scale", scale, -math.inf, math.inf)
        if dim % num_heads or dim // num_heads % 2 or local_heads >= num_heads:
            raise ConfigError(
                f"RoutingAttention has dim={dim}, num_heads={num_heads}, local_heads={local_heads}; expected heads of an even size that "
                "divide dim, and fewer local heads than heads."
            )
        self.num_heads, self.local_heads, self.head_dim = num_heads, local_heads, dim // num_heads
        self.routing_heads = num_heads - local_heads
        self.clusters, self.window, self.causal, self.mode, self.local_block = (
            clusters,
            window,
            causal,
            mode,
            local_block,
        )
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.mask_self, self.count_offset, self.rotary = mask_self, count_offset, rotary
        self.beta, self.decay = beta, decay
        routed_k = 0 if causal else self.routing_heads
        self._split = [num_heads, local_heads + routed_k, num_heads]
        self.qkv = nn.Linear(dim, sum(self._split) * self.head_dim, bias=False)
        self.mix = nn.Linear(num_heads, num_heads, bias=False) if mix_heads else None
        self.out = nn.Linear(dim, dim, bias=False)

    # --- state ------------------------------------------------------------------------------------------------------

    def initial_state(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Centroids:
        """Centroids as the authors' code begins: normalised Gaussians with counts of zero."""
        g = torch.Generator().manual_seed(seed)
        centres = normalise(torch.randn(self.routing_heads, self.clusters, self.head_dim, generator=g, dtype=dtype))
        centres = centres.to(self.out.weight.device)
        return Centroids(centres, centres, centres.new_zeros(centres.shape[:2]))

    def fit_state(self, x: Tensor, iterations: int = 10, seed: int = 0, valid: Tensor | None = None) -> Centroids:
        """Centroids from ``iterations`` rounds of k-means over the tokens of ``x`` ``(B, N, dim)``, renormalised to √D.

        Raises:
            ShapeError: shapes that do not fit.
        """
        self._check_tokens(x, valid)
        q, k, _ = self._project(x)
        tokens = self._tokens(q, k)
        state = self.initial_state(seed, tokens.dtype)
        both = valid if valid is None or self.causal else torch.cat([valid, valid], 1)
        for _ in range(iterations):
            state = update(state, tokens, 0.0, valid=both)
            state = Centroids(normalise(state.centres), state.sums, state.counts)
        return state

    # --- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self, x: Tensor, state: Centroids, *, valid: Tensor | None = None, memory: RoutingMemory | None = None
    ) -> Routed:
        """Attend, and in training mode move the centroids.

        Args:
            x: ``(B, N, dim)``.
            state: from :meth:`initial_state`, :meth:`fit_state`, or the previous call.
            valid: ``(B, N)`` bool, False on padding.
            memory: of earlier tokens of a request (causal, without padding); grows in place. The state must not change meanwhile.

        Raises:
            ShapeError: shapes that do not fit. UnsupportedError: a memory without ``causal``, with padding, or in training.
        """
        self._check(x, state, valid, memory)
        q, k, v = self._project(x)
        r = self.routing_heads
        tokens = self._tokens(q, k)
        before = 0 if memory is None or memory.values is None else memory.values.shape[2]
        place = torch.arange(before, before + x.shape[1], device=x.device)
        parts, coverage = [], 1.0
        routed_q = normalise(q[:, :r])
        routed_k = routed_q if self.causal else normalise(k[:, :r])
        local_q, local_k = q[:, r:], k[:, 0 if self.causal else r :]
        turned = [self._turn(t, place) for t in (routed_q, routed_k, local_q, local_k)]
        keys, values, seen = torch.cat([turned[1], turned[3]], 1), v, routed_q
        if memory is not None:
            if memory.values is not None and memory.keys is not None and memory.routed is not None:
                keys, values = torch.cat([memory.keys, keys], 2), torch.cat([memory.values, values], 2)
                seen = torch.cat([memory.routed, seen], 2)
            memory.keys, memory.values, memory.routed = keys, values, seen
        base = self._base(x.shape[1], before + x.shape[1], valid, x.device, self.mask_self)
        if self.mode == "strict":
            parts.append(self._strict(turned[0], keys[:, :r], values[:, :r], seen, state, base))
        elif before or (memory is not None and x.shape[1] == 1):
            out, coverage = self._paper_steps(turned[0], keys[:, :r], values[:, :r], seen, state)
            parts.append(out)
        else:
            out, coverage = self._paper(turned[0], keys[:, :r], values[:, :r], routed_q, routed_k, state, base, valid)
            parts.append(out)
        if self.local_heads:
            plain = self._base(x.shape[1], before + x.shape[1], valid, x.device, False)
            parts.append(self._local(turned[2], keys[:, r:], values[:, r:], plain))
        heads = torch.cat(parts, 1)
        if self.mix is not None:
            heads = self.mix(heads.transpose(1, -1)).transpose(1, -1)
        both = valid if valid is None or self.causal else torch.cat([valid, valid], 1)
        # shared queries and keys count twice in the loss, as the authors' code does
        loss = 2 * self.beta * clustering_loss(tokens, state.centres, both)
        new = update(state, tokens, self.decay, valid=both) if self.training else state
        return Routed(self.out(heads.transpose(1, 2).flatten(2)), new, loss, coverage)

    def route(self, q: Tensor, v: Tensor, state: Centroids) -> tuple[Tensor, float]:
        """Attention of the routing heads alone over tokens that are projected already, and the coverage; needs ``causal``.

        Args:
            q: ``(B, H, N, D)`` normalised queries, which are their own keys, not turned by position. v: ``(B, H, N, D)``.
            state: as in :meth:`forward`.

        Raises:
            ShapeError: shapes that do not fit. UnsupportedError: a layer without ``causal``.
        """
        if not self.causal:
            raise UnsupportedError("route takes queries as their own keys, which goes with causal=True.")
        if q.dim() != 4 or (q.shape[1], q.shape[3]) != (self.routing_heads, self.head_dim):
            raise ShapeError(
                f"q has shape {tuple(q.shape)}; expected (batch, {self.routing_heads}, length, {self.head_dim})."
            )
        if v.shape != q.shape:
            raise ShapeError(f"v has shape {tuple(v.shape)}; expected that of q, {tuple(q.shape)}.")
        self._check_state(state)
        base = self._base(q.shape[2], q.shape[2], None, q.device, self.mask_self)
        if self.mode == "strict":
            return self._strict(q, q, v, q, state, base), 1.0
        return self._paper(q, q, v, q, q, state, base, None)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            if n
            else x.new_empty(x.shape[0], 0, x.shape[1], self.head_dim)
            for part, n in zip(
                self.qkv(x).split([n * self.head_dim for n in self._split], -1), self._split, strict=True
            )
        )
        return q, k, v

    def _tokens(self, q: Tensor, k: Tensor) -> Tensor:
        """What is clustered: queries of routing heads, and keys where they are not shared."""
        routed = normalise(q[:, : self.routing_heads])
        return routed if self.causal else torch.cat([routed, normalise(k[:, : self.routing_heads])], 2)

    def _turn(self, x: Tensor, place: Tensor) -> Tensor:
        return rotate(x, rotary(place[:, None], self.head_dim)) if self.rotary else x

    def _base(self, q_len: int, kv_len: int, valid: Tensor | None, device: torch.device, mask_self: bool) -> BaseMask:
        shift = kv_len - q_len

        def others(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return q + shift != k

        return BaseMask.build(
            q_len, kv_len, causal=self.causal, shift=shift, valid=valid, predicate=others if mask_self else None, device=device
        )  # fmt: skip

    def _check(self, x: Tensor, state: Centroids, valid: Tensor | None, memory: RoutingMemory | None) -> None:
        self._check_tokens(x, valid)
        self._check_state(state)
        if memory is None:
            return
        if not self.causal or valid is not None or self.training:
            raise UnsupportedError(
                "a memory goes with causal=True, without padding, in eval mode; decode rows of equal length, or one by one."
            )
        if not isinstance(memory, RoutingMemory):
            raise ShapeError(f"memory is a {type(memory).__name__}; expected a RoutingMemory.")
        parts = (memory.routed, memory.keys, memory.values)
        shapes = tuple(None if part is None else tuple(part.shape) for part in parts)
        length = None if memory.values is None or memory.values.dim() != 4 else memory.values.shape[2]
        expected = tuple(
            (x.shape[0], heads, length, self.head_dim) for heads in (self.routing_heads, self.num_heads, self.num_heads)
        )
        if shapes not in ((None,) * 3, expected):
            raise ShapeError(
                f"memory has routed, keys and values of shapes {', '.join(map(str, shapes))}; expected those of this layer and batch, "
                f"({x.shape[0]}, {self.routing_heads} and twice {self.num_heads}, length, {self.head_dim})."
            )

    def _check_tokens(self, x: Tensor, valid: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.out.in_features:
            raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, length, {self.out.in_features}).")
        if valid is not None and tuple(valid.shape) != tuple(x.shape[:2]):
            raise ShapeError(f"valid has shape {tuple(valid.shape)}; expected {tuple(x.shape[:2])}.")

    def _check_state(self, state: Centroids) -> None:
        if not isinstance(state, Centroids):
            raise ShapeError(
                f"state is a {type(state).__name__}; expected Centroids: make them with initial_state or fit_state of this layer."
            )
        each = (self.routing_heads, self.clusters, self.head_dim)
        for name, expected in (("centres", each), ("sums", each), ("counts", each[:2])):
            shape = tuple(getattr(state, name).shape)
            if shape != expected:
                raise ShapeError(
                    f"state.{name} has shape {shape}; expected {expected}: make the state with initial_state or fit_state of this layer."
                )

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, base: BaseMask) -> Tensor:
        return compute(AttentionCall(q, k, v, layout, base, self.scale, return_lse=False))[0]

    # --- strict: the last members of one's own cluster ---------------------------------------------------------------

    def _strict(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, state: Centroids, base: BaseMask) -> Tensor:
        cluster = assign(seen.detach(), state.centres)  # (B, H, n)
        if base.q_len < base.kv_len:
            return self._attend(q, k, v, last_members(cluster, base.q_len, self.window), base)
        if base.valid is not None:  # padding is a cluster of its own
            cluster = torch.where(base.valid[:, None], cluster, self.clusters)
        order = cluster.argsort(dim=-1, stable=True)  # by cluster, inside it by time: causal in this order too
        at = order[..., None].expand(-1, -1, -1, q.shape[-1])
        mask = cluster_band(cluster.gather(-1, order), self.window, self.mask_self)
        plain = BaseMask.build(base.q_len, base.kv_len, causal=True, device=q.device)
        sorted_out = self._attend(q.gather(2, at), k.gather(2, at), v.gather(2, at), mask, plain)
        out = torch.zeros_like(sorted_out).scatter(2, at, sorted_out)
        return out if base.valid is None else out * base.valid[:, None, :, None].to(out.dtype)

    # --- paper: the nearest tokens of every centroid ------------------------------------------------------------------

    def _paper(
        self, q: Tensor, k: Tensor, v: Tensor, routed_q: Tensor, routed_k: Tensor, state: Centroids, base: BaseMask,
        valid: Tensor | None,
    ) -> tuple[Tensor, float]:  # fmt: skip
        ours = nearest_tokens(routed_q.detach(), state.centres, self.window, valid)
        theirs = ours if self.causal else nearest_tokens(routed_k.detach(), state.centres, self.window, valid)
        q_index, cu_q = flat_members(*ours, q.shape[2])
        k_index, cu_k = flat_members(*theirs, k.shape[2])
        out = self._attend(q, k, v, Groups(q_index, cu_q, k_index, cu_k, per_head=True, combine="mean"), base)
        count = torch.bincount(q_index, minlength=q.shape[0] * q.shape[1] * q.shape[2]).view(q.shape[:3])
        real = count if valid is None else count[valid[:, None].expand_as(count)]
        if self.count_offset:
            out = out * (count / (count + self.count_offset))[..., None].to(out.dtype)
        return out, float((real > 0).double().mean())

    def _paper_steps(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, state: Centroids) -> tuple[Tensor, float]:
        """Each new token as the last of its prefix: membership is found anew for every one."""
        rows, covered = [], []
        for i in range(q.shape[2]):
            n = k.shape[2] - q.shape[2] + i + 1
            index, real = nearest_tokens(seen[:, :, :n], state.centres, self.window)
            mine = (index == n - 1).any(-1)  # (B, H, C): clusters that hold the new token
            row = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(*q.shape[:2], 1).expand_as(mine)
            k_index, cu_k = flat_members(index[mine][:, None], real[mine][:, None], n, row[mine])
            cu_q = torch.arange(int(mine.sum()) + 1, device=q.device)
            groups = Groups(row[mine], cu_q, k_index, cu_k, per_head=True, combine="mean")
            base = self._base(1, n, None, q.device, self.mask_self)
            out = self._attend(q[:, :, i : i + 1], k[:, :, :n], v[:, :, :n], groups, base)
            count = mine.sum(-1)
            covered.append((count > 0).double().mean())
            rows.append(out * (count / (count + self.count_offset).clamp(min=1e-30))[..., None, None].to(out.dtype))
        return torch.cat(rows, 2), float(torch.stack(covered).mean())

    # --- local heads --------------------------------------------------------------------------------------------------

    def _local(self, q: Tensor, k: Tensor, v: Tensor, base: BaseMask) -> Tensor:
        size = self.local_block
        if base.q_len < base.kv_len:
            own = torch.arange(base.shift, base.kv_len, device=q.device)
            first = (own // size - 1).clamp(min=0) * size
            index = first[:, None] + torch.arange(2 * size, device=q.device)
            index = torch.where(index <= own[:, None], index, -1)
            return self._attend(q, k, v, KeySelection(index[None, None], 1), base)
        blocks = math.ceil(base.q_len / size)
        distance = torch.arange(blocks)[:, None] - torch.arange(blocks)
        near = (distance >= (0 if self.causal else -1)) & (distance <= 1)
        kinds = torch.where(near, FULL, EMPTY).to(torch.int8)[None, None].to(q.device)
        return self._attend(q, k, v, block_mask(kinds, (size, size), (base.q_len, base.kv_len)), base)


__all__ = ["Centroids", "Routed", "RoutingAttention", "RoutingMemory"]
