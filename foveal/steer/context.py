"""Steer a model towards the user's text: keys outside it count α times as much (arXiv 2411.02688, after PASTA).

In a row with user mass p the new mass is ``p / (p + α(1 − p))``; ratios inside and outside the user's text stay as they are. It equals adding
``log α`` to the scores of the other keys, and is computed exactly as two attentions over disjoint keys joined by their log-sum-exps: no
N×N mask, any kernel, prefill and decoding alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.base_mask import BaseMask
from ..core.errors import ConfigError, ShapeError
from ..hf.families import AttentionSite
from ..hf.own import own_attention
from ..kernels.call import AttentionCall
from ..kernels.dispatch import compute
from ..kernels.merge import merge

GENERATED = ("keep", "scale")


def steered_mass(p: float, alpha: float) -> float:
    """User mass after steering, from the mass before."""
    return p / (p + alpha * (1 - p)) if p or alpha else 0.0


def steered(
    call: AttentionCall, outside: Tensor, alpha: float, sinks: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """One attention with the weights of some keys multiplied by ``alpha`` and every row made to sum to 1 again.

    Args:
        call: the attention. outside: ``(B or 1, Nk)`` bool, the keys that count less. alpha: in (0, 1].
        sinks: ``(H,)`` learned logits of a key without a value, which lies outside too. impl: kernel implementation.

    Returns:
        ``(B, H, Nq, Dv)``. Rows that see no key inside keep their relative weights.
    """
    parts = [compute(call.replace(base=_only(call.base, keep), return_lse=True), impl) for keep in (~outside, outside)]
    outs, lses = [out for out, _ in parts], [lse for _, lse in parts if lse is not None]
    lses[1] = lses[1] + math.log(alpha)
    if sinks is not None:
        outs.append(torch.zeros_like(outs[0]))
        lses.append((sinks.to(lses[0].dtype) + math.log(alpha))[None, :, None].expand_as(lses[0]))
    return merge(outs, lses)[0]


def _only(base: BaseMask, keep: Tensor) -> BaseMask:
    """The mask with the other keys hidden like padding."""
    valid = keep if base.valid is None else keep & base.valid
    cache = {k: v for k, v in base.cache.items() if k == "predicate_batch"}
    return replace(base, valid=valid, plain=False, cache=cache)


@contextmanager
def context_steering(
    model: nn.Module, user: Tensor, alpha: float = 0.95, *, attention_mask: Tensor | None = None, generated: str = "keep",
    layers: Collection[int] | None = None, impl: str = "auto",
) -> Iterator[None]:  # fmt: skip
    """Weigh the keys outside the user's text by ``alpha`` in every head, inside the block; ``generate`` works unchanged.

    Args:
        model: a decoder. user: ``(N,)`` or ``(B, N)`` bool over the prompt's tokens, see :func:`foveal.data.chat.read_chat`;
            several spans make one mask. alpha: in (0, 1]; 0.95 in the paper's table; 1 leaves the model alone.
        attention_mask: ``(B, N)`` of the prompt, where it is padded on the left.
        generated: "keep" leaves the weight of keys after the prompt at 1 (the authors' code), "scale" counts them as outside (the
            paper's text). layers: default all. impl: kernel implementation.

    Raises:
        ConfigError: alpha or generated out of range, no user token. ShapeError: masks of another shape or dtype.
        UnsupportedError: a family that foveal does not reach, or a policy attached at the same time.
    """
    if not 0 < alpha <= 1:
        raise ConfigError(f"alpha is {alpha}; expected a number above 0 and at most 1, such as 0.95.")
    if generated not in GENERATED:
        raise ConfigError(f"generated is {generated!r}; expected 'keep' or 'scale'.")
    by_rank = _by_rank(user, attention_mask)
    if alpha == 1:
        yield
        return

    def attention(site: AttentionSite, call: AttentionCall, sinks: Tensor | None) -> Tensor:
        if layers is not None and site.index not in layers:
            return compute(call.replace(return_lse=sinks is not None), impl, sinks)[0]
        return steered(call, _outside(call, by_rank, generated == "scale"), alpha, sinks, impl)

    with own_attention(model, attention):
        yield


def _by_rank(user: Tensor, attention_mask: Tensor | None) -> Tensor:
    """``(B, N)`` bool by position inside each sequence: left padding taken away."""
    user = user[None] if user.dim() == 1 else user
    if user.dim() != 2 or user.dtype != torch.bool:
        raise ShapeError(f"user has shape {tuple(user.shape)} and dtype {user.dtype}; expected bool (N,) or (B, N).")
    if not bool(user.any(-1).all()):
        raise ConfigError("user marks no token in some sequence; there is nothing to steer towards.")
    if attention_mask is None:
        return user
    if attention_mask.shape != user.shape:
        raise ShapeError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected {tuple(user.shape)}, as user has."
        )
    real = attention_mask.bool()
    rank = (real.long().cumsum(-1) - 1).clamp(min=0)
    return torch.zeros_like(user).scatter_reduce(1, rank, user & real, "amax")


def _outside(call: AttentionCall, by_rank: Tensor, scale_generated: bool) -> Tensor:
    """``(B, Nk)`` bool over the keys of a call."""
    batch, rank = call.k.shape[0], call.base.rank
    if batch % by_rank.shape[0]:
        raise ShapeError(f"user is given for {by_rank.shape[0]} sequences and the model runs {batch}.")
    inside = by_rank.to(rank.device).repeat_interleave(batch // by_rank.shape[0], 0)  # beams of one prompt lie together
    rank = rank.expand(batch, -1)
    known = inside.gather(1, rank.clamp(0, inside.shape[1] - 1)) & (rank >= 0)
    return torch.where(rank >= inside.shape[1], scale_generated, ~known)
