"""SHRP's expert attention (arXiv 2512.20635): each head is an expert, every token takes the output of one of them.

    o_e = softmax(q_e k_eᵀ/√d) v_e;  p = softmax((x W_r + b_r)/τ);  e* = argmax p;  y = g o_{e*};  x' = LN(x + E(y))

E is a small feed-forward network that all heads of the layer share and that takes a head's d numbers to the model's D. Neither
the output projection nor the wide feed-forward network of the original layer is left. After training one head is kept.

Only the paper's abstract could be read: heads as experts, a shared expander, top-1 routing by which usage is counted, and
deterministic pruning. The gate, the level of routing and the expander's width are reconstructions, and arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError, nearest
from ..core.layouts import Groups
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute

Gate = Literal["straight_through", "prob"]
Level = Literal["token", "mean", "cls"]
Form = Literal["dense", "sparse", "average"]


@dataclass(frozen=True, eq=False)
class Routing:
    """Where tokens went: ``choice`` ``(B, N)`` int64, the ``probabilities`` ``(B, N, H)``, and the ``gate`` ``(B, N)``."""

    choice: Tensor
    probabilities: Tensor
    gate: Tensor


class Expander(nn.Module):
    """``W_2 GELU(W_1 y + b_1) + b_2`` from a head's ``head_dim`` to ``dim``; one linear map when ``hidden`` is 0."""

    def __init__(self, head_dim: int, dim: int, hidden: int = 96) -> None:
        super().__init__()
        self.inner = nn.Linear(head_dim, hidden) if hidden else None
        self.outer = nn.Linear(hidden or head_dim, dim)

    def features(self, y: Tensor) -> Tensor:
        """What the last linear map reads."""
        return y if self.inner is None else F.gelu(self.inner(y))

    def forward(self, y: Tensor) -> Tensor:
        return self.outer(self.features(y))


class PrunedExpertLayer(nn.Module):
    """What is left after pruning: one head, the expander, a norm. ``(B, N, dim)`` in and out.

    Args:
        dim, head_dim: D and d. expander: the shared network. eps: of the norm. dropout: before the residual sum.
        ffn: the original feed-forward part, kept as an ablation. impl: of the attention.
    """

    def __init__(
        self,
        dim: int,
        head_dim: int,
        expander: Expander,
        *,
        eps: float = 1e-12,
        dropout: float = 0.0,
        ffn: nn.Module | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(dim, head_dim) for _ in range(3))
        self.expander, self.norm, self.dropout = expander, nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout)
        self.ffn, self.impl = ffn, impl

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``valid`` ``(B, N)`` bool is False on padding."""
        check_tokens(x, self.q.in_features, valid)
        q, k, v = (f(x)[:, None] for f in (self.q, self.k, self.v))
        return finish(self, x, heads(q, k, v, valid, self.impl)[:, 0])


class ExpertAttention(nn.Module):
    """The layer to train: all heads, the router, the shared expander. ``(B, N, dim)`` in and out.

    Args:
        dim: D. num_heads: H experts of ``head_dim`` d (default D/H). num_kv_heads: fewer key heads, as in grouped attention.
        expander: hidden width, 0 for a linear map, or an :class:`Expander` to share with other layers.
        gate: ``"straight_through"`` has forward value 1, so pruning changes no output of tokens that chose the kept head, and
            lets the gradient reach the router; ``"prob"`` scales by the probability, as Switch does.
        route_level: ``"token"``; or the whole sequence by its ``"mean"`` or its first token (``"cls"``).
        temperature: τ. dropout: before the residual sum. eps: of the norm.
        form: ``"dense"`` computes all heads and picks; ``"sparse"`` computes a token's query and attention for its head alone;
            ``"average"`` takes the mean of all heads, a warm-up before routing.
        ffn: the original feed-forward part, kept as an ablation. impl: of the attention.

    Raises:
        ConfigError: sizes or names that do not go together.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        expander: int | Expander = 96,
        gate: Gate = "straight_through",
        route_level: Level = "token",
        temperature: float = 1.0,
        dropout: float = 0.0,
        eps: float = 1e-12,
        form: Form = "dense",
        ffn: nn.Module | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or (head_dim is None and dim % num_heads) or kv_heads < 1 or num_heads % kv_heads:
            raise ConfigError(
                f"ExpertAttention has dim={dim}, num_heads={num_heads}, num_kv_heads={kv_heads}; expected heads that divide dim "
                "(or a head_dim), and num_kv_heads that divide num_heads."
            )
        for name, value, known in (
            ("gate", gate, ("straight_through", "prob")),
            ("route_level", route_level, ("token", "mean", "cls")),
            ("form", form, ("dense", "sparse", "average")),
        ):
            if value not in known:
                raise ConfigError(f"ExpertAttention.{name} is {value!r}. {nearest(str(value), known)}")
        if not temperature > 0 or (isinstance(expander, int) and expander < 0):
            raise ConfigError(
                f"ExpertAttention has temperature={temperature} and expander={expander}; expected above 0, and a width from 0."
            )
        d = dim // num_heads if head_dim is None else head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, d
        self.gate, self.route_level, self.temperature, self.form, self.impl = gate, route_level, temperature, form, impl
        self.q = nn.Linear(dim, num_heads * d)
        self.k, self.v = nn.Linear(dim, kv_heads * d), nn.Linear(dim, kv_heads * d)
        self.router = nn.Linear(dim, num_heads)
        self.expander = Expander(d, dim, expander) if isinstance(expander, int) else expander
        self.norm, self.dropout, self.ffn = nn.LayerNorm(dim, eps=eps), nn.Dropout(dropout), ffn

    def route(self, x: Tensor, valid: Tensor | None = None) -> Routing:
        """The router's decision for ``x`` ``(B, N, dim)``, in float32 at least."""
        if self.route_level == "cls":
            read = x[:, :1]
        elif self.route_level == "mean":
            weight = x.new_ones(x.shape[:2]) if valid is None else valid.to(x.dtype)
            read = (x * weight[..., None]).sum(1, keepdim=True) / weight.sum(1).clamp(min=1)[:, None, None]
        else:
            read = x
        work = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(read.to(work), self.router.weight.to(work), self.router.bias.to(work))
        p = torch.softmax(logits / self.temperature, -1).expand(-1, x.shape[1], -1)
        best, choice = p.max(-1)
        return Routing(choice, p, best if self.gate == "prob" else best / best.detach())

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """``valid`` ``(B, N)`` bool is False on padding; padded tokens change neither outputs nor routing of real ones.

        Raises:
            ShapeError: shapes that do not fit.
        """
        check_tokens(x, self.q.in_features, valid)
        if self.form == "average":
            return finish(self, x, self.experts(x, valid).mean(1))
        routing = self.route(x, valid)
        if self.form == "sparse":
            y = self._sparse(x, valid, routing.choice)
        else:
            at = routing.choice[:, None, :, None].expand(-1, 1, -1, self.head_dim)
            y = self.experts(x, valid).gather(1, at)[:, 0]
        return finish(self, x, y * routing.gate[..., None].to(y.dtype))

    def experts(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """All heads' outputs ``(B, H, N, d)``."""
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return heads(q, k, v, valid, self.impl)

    def _sparse(self, x: Tensor, valid: Tensor | None, choice: Tensor) -> Tensor:
        """One query per token, of its own head, over that head's keys: groups of queries by row and head.

        Padding goes to head 0 whatever it holds: matrix products of another number of rows may round real tokens differently.
        """
        batch, length, _ = x.shape
        choice = choice if valid is None else choice.masked_fill(~valid, 0)
        experts, kv = self.num_heads, self.num_kv_heads
        place = (torch.arange(batch, device=x.device)[:, None] * experts + choice).flatten()
        order = place.argsort(stable=True)
        counts = place.bincount(minlength=batch * experts)
        flat, rows = x.flatten(0, 1), choice.flatten()
        q = torch.zeros(batch * length, self.head_dim, dtype=self.q(flat[:0]).dtype, device=x.device)
        for e in range(experts):
            at, part = (rows == e).nonzero()[:, 0], slice(e * self.head_dim, (e + 1) * self.head_dim)
            q = q.index_put((at,), F.linear(flat[at], self.q.weight[part], self.q.bias[part]))
        k, v = (  # (B, 1, Hkv·N, d): every key head's tokens, one head after the other
            f(x).unflatten(-1, (kv, self.head_dim)).transpose(1, 2).flatten(1, 2)[:, None] for f in (self.k, self.v)
        )
        head = torch.arange(experts, device=x.device) * kv // experts
        first = torch.arange(batch, device=x.device)[:, None] * kv * length + head * length
        k_index = (first.flatten()[:, None] + torch.arange(length, device=x.device)).flatten()
        ends = [F.pad(n.cumsum(0), (1, 0)) for n in (counts, torch.full_like(counts, length))]
        layout = Groups(order, ends[0], k_index, ends[1], False, "softmax")
        keys = None if valid is None else valid.repeat(1, kv)
        base = BaseMask.build(length, kv * length, causal=False, valid=keys, device=x.device)
        call = AttentionCall(
            q.unflatten(0, (batch, length))[:, None], k, v, layout, base, self.head_dim**-0.5, return_lse=False
        )
        return compute(call, self.impl)[0][:, 0]

    def pruned(self, head: int, scale: float = 1.0) -> PrunedExpertLayer:
        """A copy with one head and no router; ``scale`` is the mean of a ``"prob"`` gate, folded into the expander's first map.

        Raises:
            ConfigError: no such head.
        """
        if not 0 <= head < self.num_heads:
            raise ConfigError(f"head is {head}; expected 0 to {self.num_heads - 1}.")
        dim, d = self.q.in_features, self.head_dim
        hidden = 0 if self.expander.inner is None else self.expander.inner.out_features
        dropout = float(self.dropout.p)
        layer = PrunedExpertLayer(
            dim, d, Expander(d, dim, hidden), eps=self.norm.eps, dropout=dropout, ffn=self.ffn, impl=self.impl
        ).to(self.q.weight)
        own = head * self.num_kv_heads // self.num_heads
        with torch.no_grad():
            for name, index in (("q", head), ("k", own), ("v", own)):
                part = slice(index * d, (index + 1) * d)
                getattr(layer, name).weight.copy_(getattr(self, name).weight[part])
                getattr(layer, name).bias.copy_(getattr(self, name).bias[part])
            layer.expander.load_state_dict(self.expander.state_dict())
            layer.norm.load_state_dict(self.norm.state_dict())
            first = layer.expander.outer if layer.expander.inner is None else layer.expander.inner
            if scale != 1.0:
                first.weight.mul_(scale)
        return layer.train(self.training)


def heads(q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, impl: str) -> Tensor:
    """Full attention ``(B, H, N, d)`` over the keys that ``valid`` ``(B, N)`` leaves."""
    base = BaseMask.build(q.shape[2], k.shape[2], causal=False, valid=valid, device=q.device)
    return compute(AttentionCall(q, k, v, None, base, q.shape[-1] ** -0.5, return_lse=False), impl)[0]


def finish(layer: PrunedExpertLayer | ExpertAttention, x: Tensor, y: Tensor) -> Tensor:
    """``LN(x + Dropout(E(y)))``, and the feed-forward part where it was kept."""
    out = layer.norm(x + layer.dropout(layer.expander(y)))
    return out if layer.ffn is None else layer.ffn(out)


def check_tokens(x: Tensor, dim: int, valid: Tensor | None) -> None:
    """Raise :class:`ShapeError` unless ``x`` is ``(B, N, dim)`` and ``valid`` is ``(B, N)`` bool."""
    if x.dim() != 3 or x.shape[-1] != dim:
        raise ShapeError(f"x has shape {tuple(x.shape)}; expected (batch, length, {dim}).")
    if valid is not None and (tuple(valid.shape) != tuple(x.shape[:2]) or valid.dtype != torch.bool):
        raise ShapeError(f"valid is {tuple(valid.shape)} {valid.dtype}; expected {tuple(x.shape[:2])} torch.bool.")


def share_entropy(share: Tensor) -> Tensor:
    """``−Σ share log share`` over the last axis, in nats; 0·log 0 is 0."""
    return -torch.xlogy(share, share).sum(-1)
