"""Attention whose input is mixed with the token before: a convolution of width 2, the "smeared keys" of arXiv 2209.11895.

A token that knows its predecessor turns associative recall (what followed this key?) into a single match of query and key.
Without it two layers must find each other first, which takes small models thousands of steps; with it hundreds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import AttentionFactory, Pass, SelfAttention, check_remembered


class Shifted(nn.Module):
    """``attention(x_t + w ∘ x_{t−1})`` with a learned ``w`` per channel; the first token has no predecessor.

    Args:
        dim: width. attention: any layer of a backbone.
        layer_index: where in the backbone.
    """

    def __init__(self, dim: int, attention: nn.Module, layer_index: int) -> None:
        super().__init__()
        self.attention, self.layer_index = attention, layer_index
        self.before = nn.Parameter(torch.full((dim,), 0.5))

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """``(B, N, dim)`` in and out."""
        last = x.new_zeros(x.shape[0], 1, x.shape[2])
        if run.memory is not None:
            last = run.memory.last.get(self.layer_index, last)
            check_remembered("last tokens", last, x[:, :1], 1, self.layer_index)
            run.memory.last[self.layer_index] = x[:, -1:]
        before = torch.cat([last, x[:, :-1]], 1)
        if run.base.valid is not None:  # padding precedes nothing
            at = torch.arange(x.shape[1], device=x.device) + run.base.shift - 1
            before = before * run.base.valid[:, at.clamp(min=0), None].to(x.dtype)
        return self.attention(x + self.before * before, run)


def shifted_factory(dim: int, num_heads: int, num_kv_heads: int | None = None) -> AttentionFactory:
    """:class:`Shifted` self-attention in every layer."""
    return lambda index: Shifted(dim, SelfAttention(dim, num_heads, index, num_kv_heads), index)
